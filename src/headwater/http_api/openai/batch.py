"""What both OpenAI routes share: start the generations of a body, and tell usage and finish of a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from headwater.generation.errors import aborted, bad_request, model_not_found
from headwater.generation.model_facts import ModelFacts
from headwater.generation.sampling import PromptTokens, check_prompt, fit, for_sample
from headwater.generation.text_generation import TextChunk, TextGeneration, TextGenerator, merge, run_all
from headwater.generation.text_request import TextRequest
from headwater.http_api.openai.format import ChunkWriter, extension, metadata, usage_event, usage_of
from headwater.http_api.openai.schemas import OpenAIRequest
from headwater.messages.generation import Finish, LogprobParams, SamplingParams

Json = dict[str, Any]


class ChoiceStream(Protocol):
    """Writes the chunks of one choice."""

    def events(self, chunk: TextChunk) -> bytes:
        """Events for what is new, without the one that tells the end; may be empty."""
        ...

    def last_event(self, extra: Json) -> bytes:
        """The event with the finish reason; `extra` are further fields of the chunk."""
        ...


def check_model(name: str, model: ModelFacts) -> None:
    """Raises ApiError 404 for a model that is not served."""
    if name not in (model.served_name, "default", ""):
        raise model_not_found(name, model.served_name)


@dataclass(frozen=True, slots=True)
class Heading:
    """What every answer and every chunk of one request begins with."""

    id: str
    object: str
    created: int  # Unix time
    model: str

    @classmethod
    def of(cls, request: OpenAIRequest, model: ModelFacts, *, prefix: str, object: str) -> "Heading":
        """The id is the rid, so that a client can abort by the id it was told."""
        return cls(request.rid or f"{prefix}-{uuid.uuid4().hex}", object, int(time.time()), model.served_name)

    def fields(self) -> Json:
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}

    def writer(self, index: int, *, has_usage: bool) -> ChunkWriter:
        return ChunkWriter(**self.fields(), index=index, has_usage=has_usage)


class OpenAIBatch:
    """The running generations of one body: `request.n` for each prompt, in the order of the choices."""

    def __init__(self, request: OpenAIRequest, heading: Heading) -> None:
        self.request = request
        self.heading = heading
        self.generations: list[TextGeneration] = []

    def start(
        self,
        generator: TextGenerator,
        model: ModelFacts,
        prompts: Sequence[PromptTokens],
        *,
        param: str,
        sampling: SamplingParams,
        logprobs: LogprobParams | None,
    ) -> None:
        """Check the prompts and send everything. Raises InvalidRequest, EngineGone, RidInUse."""
        is_prefill = sampling.max_new_tokens == 0
        checked = [check_prompt(prompt, model, param=param, is_prefill=is_prefill) for prompt in prompts]
        given = self.request
        options, text = given.engine_options(), given.text_options()
        is_single = len(prompts) * given.n == 1
        try:
            with generator.together():
                for number, prompt_ids in enumerate(checked):
                    text_request = TextRequest(
                        rid=self.heading.id,
                        prompt_ids=prompt_ids,
                        sampling=fit(sampling, len(prompt_ids), model),
                        logprobs=logprobs,
                        options=options,
                        text=text,
                        engine=given.engine,
                        is_streaming=given.stream,
                    )
                    for sample in range(given.n):
                        rid = self.heading.id if is_single else f"{self.heading.id}_{number * given.n + sample}"
                        named = replace(text_request, rid=rid, sampling=for_sample(text_request.sampling, sample))
                        self.generations.append(generator.start(named))
        except BaseException:
            self.close()
            raise

    async def collect(self) -> Json:
        """Run to the end; the fields of a whole answer, choices aside. Raises EngineGone, ApiError."""
        await run_all(self.generations)
        for generation in self.generations:
            self._raise_if_aborted(generation)
        n = self.request.n
        answer = self.heading.fields() | {"usage": usage_of(self.generations, n=n)}
        answer["metadata"] = metadata(self.generations[0].meta)
        if self.request.return_cached_tokens_details:
            answer["sglext"] = extension(self.generations, n=n)
        return answer

    async def events(self, choices: Sequence[ChoiceStream]) -> AsyncGenerator[bytes]:
        """The stream, without the closing [DONE]; one `ChoiceStream` for each generation."""
        given = self.request
        async with aclosing(merge(self.generations)) as news:
            async for chunks in news:
                pieces = b"".join(self._events_of(choices[index], index, chunk) for index, chunk in chunks)
                if pieces:
                    yield pieces
                for index, _ in chunks:
                    self._raise_if_aborted(self.generations[index])
        if given.stream_options.include_usage:
            yield usage_event(**self.heading.fields(), usage=usage_of(self.generations, n=given.n))

    def _events_of(self, choice: ChoiceStream, index: int, chunk: TextChunk) -> bytes:
        if chunk.finish is None:
            return choice.events(chunk)
        if self._is_error(chunk.finish):  # which comes next
            return choice.events(chunk) if chunk.text else b""
        return choice.events(chunk) + choice.last_event(self._last_fields(index))

    def continuous_usage(self, index: int) -> Json | None:
        """The usage of one choice so far, if every chunk is to tell it."""
        if not self.request.stream_options.continuous_usage_stats:
            return None
        return {"usage": usage_of([self.generations[index]], n=1)}

    def _is_error(self, finish: Finish) -> bool:
        return finish.type == "abort" and not self.request.return_partial_on_abort

    def _raise_if_aborted(self, generation: TextGeneration) -> None:
        """An answer that somebody ended is none, and must not look like one. Raises ApiError."""
        finish = generation.finish
        if finish is not None and self._is_error(finish):
            raise aborted(finish)

    def close(self) -> None:
        """Abort what still runs."""
        for generation in self.generations:
            generation.close()

    def _last_fields(self, index: int) -> Json:
        generation = self.generations[index]
        fields: Json = {"metadata": metadata(generation.meta)}
        if self.request.return_cached_tokens_details:
            fields["sglext"] = extension([generation], n=1)
        return fields | (self.continuous_usage(index) or {})


def check_batch(num_prompts: int, max_batch: int, *, param: str) -> None:
    if not 1 <= num_prompts <= max_batch:
        raise bad_request(param, f"{param}: must hold 1 to {max_batch} prompts, got {num_prompts}")
