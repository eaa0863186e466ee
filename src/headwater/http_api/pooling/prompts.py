"""Texts and token ids of a body as checked prompts, and their requests, which write no text."""

import uuid
from array import array
from collections.abc import Sequence
from typing import Any

from msgspec import structs

from headwater.generation.errors import aborted, bad_request, model_not_found
from headwater.generation.model_facts import ModelFacts
from headwater.generation.sampling import check_prompt
from headwater.generation.text_generation import TextGeneration, TextGenerator, run_all
from headwater.generation.text_request import TextRequest
from headwater.http_api.pooling.schemas import PoolingFields
from headwater.http_api.services import Services
from headwater.messages.base import TokenArray
from headwater.messages.generation import LogprobParams, Pooling, SamplingParams


def check_model(name: str, model: ModelFacts) -> None:
    """Raises ApiError 404 for a model that is not served."""
    if model.adapter_of(name) is None:
        raise model_not_found(name, model.served_name)


def as_list(given: Any) -> tuple[list[Any], bool]:
    """The texts or lists of ids of a field, and whether there were several."""
    is_one = isinstance(given, str | array) or not given or isinstance(given[0], int)
    return ([given], False) if is_one else (list(given), True)


async def read_prompts(
    items: Sequence[Any], body: PoolingFields, services: Services, *, param: str, is_prefill: bool
) -> list[TokenArray]:
    """Checked token ids of texts or token ids. InvalidRequest names `param`."""
    limit = services.state.limits.max_batch
    if not 1 <= len(items) <= limit:
        raise bad_request(param, f"{param}: must hold 1 to {limit} texts, got {len(items)}")
    prompts: list[TokenArray] = []
    for item in items:
        ids = item if not isinstance(item, str) else await _encode(item, body, services.generator, param=param)
        prompts.append(check_prompt(ids, services.model, param=param, is_prefill=is_prefill))
    return prompts


async def _encode(text: str, body: PoolingFields, generator: TextGenerator, *, param: str) -> list[int]:
    return await generator.encode(
        text,
        param=param,
        add_special_tokens=body.add_special_tokens,
        parse_special_tokens=body.parse_special_tokens,
    )


class PromptRun:
    """Requests for each of several prompts. The caller closes it."""

    def __init__(
        self,
        prompts: Sequence[TokenArray],
        body: PoolingFields,
        services: Services,
        *,
        sampling: SamplingParams,
        pooling: Pooling | None = None,
        logprobs: LogprobParams | None = None,
    ) -> None:
        """Sends everything. Raises ApiError, EngineGone, RidInUse; then nothing runs."""
        name, generator = body.rid or uuid.uuid4().hex, services.generator
        adapter = services.model.adapter_of(body.model) or ""
        options = structs.replace(body.engine_options(), lora_name=adapter)
        self.generations: list[TextGeneration] = []
        try:
            with generator.together():
                for number, prompt_ids in enumerate(prompts):
                    request = TextRequest(
                        rid=name if len(prompts) == 1 else f"{name}_{number}",
                        prompt_ids=prompt_ids,
                        sampling=sampling,
                        logprobs=logprobs,
                        options=options,
                        pooling=pooling,
                        engine=body.engine,
                        is_streaming=False,
                    )
                    self.generations.append(generator.start(request))
        except BaseException:
            self.close()
            raise

    async def finish(self) -> list[TextGeneration]:
        """Run to the end. Raises ApiError, also if a request was aborted; EngineGone."""
        await run_all(self.generations)
        for generation in self.generations:
            if generation.finish is not None and generation.finish.type == "abort":
                raise aborted(generation.finish)
        return self.generations

    def close(self) -> None:
        """Abort what still runs."""
        for generation in self.generations:
            generation.close()
