"""The work of /generate, for the HTTP route and the Python API."""

import uuid
from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from msgspec import structs

from headwater.generation.answer_fields import Json
from headwater.generation.errors import adapter_not_found, bad_request
from headwater.generation.model_facts import ModelFacts, RequestLimits
from headwater.generation.native_answer import LogprobFormat, NativeAnswer
from headwater.generation.native_schemas import GenerateRequest, SamplingInput
from headwater.generation.sampling import (
    PromptTokens,
    check_no_minimum,
    check_prompt,
    engine_sampling,
    fit,
    for_sample,
)
from headwater.generation.text_generation import TextChunk, TextGenerator, merge, run_all
from headwater.generation.text_request import TextRequest
from headwater.messages.generation import Grammar, LogprobParams, SamplingParams


class NativeApi:
    """Turns bodies of /generate into running batches."""

    def __init__(self, generator: TextGenerator, model: ModelFacts, limits: RequestLimits) -> None:
        self._generator = generator
        self._model = model
        self._limits = limits

    async def start(self, request: GenerateRequest) -> "NativeBatch":
        """Check the request and send it to the engine. The caller owns the batch and closes it.

        Raises InvalidRequest (a ValueError) for the user's mistakes, EngineGone, RidInUse.
        """
        prompts, is_batch = await self._prompts(request)
        given = self._per_prompt(request, len(prompts), is_batch=is_batch)
        asked = self._asked_ids(request, len(prompts), is_batch=is_batch)
        grammars = await self._grammars(request.sampling_params, len(prompts))
        requests: list[TextRequest] = []
        adapters = self._adapters(request.lora_path, len(prompts), is_batch=is_batch)
        for prompt, sampling, asked_ids, grammar, adapter in zip(
            prompts, given, asked, grammars, adapters, strict=True
        ):
            of_prompt = self._requests(request, prompt, sampling, asked_ids, adapter)
            requests += [replace(it, grammar=grammar) for it in of_prompt]
        is_list = is_batch or len(requests) > 1
        rids = _rids(request.rid, len(requests), is_list=is_list)
        named = [replace(r, rid=rid) for r, rid in zip(requests, rids, strict=True)]
        return self._send(request, named, is_list=is_list)

    def _send(self, request: GenerateRequest, requests: list[TextRequest], *, is_list: bool) -> "NativeBatch":
        batch = NativeBatch(is_list=is_list)
        try:
            with self._generator.together():
                for text_request in requests:
                    answer = self._generator.start(text_request)
                    texts = self._format(request, text_request.logprobs)
                    batch.answers.append(NativeAnswer(answer, texts, with_prompt_ids=request.return_prompt_token_ids))
        except BaseException:
            batch.close()
            raise
        return batch

    def _format(self, request: GenerateRequest, asked: LogprobParams | None) -> LogprobFormat | None:
        if asked is None:
            return None
        return LogprobFormat(
            self._generator.tokenizer, with_text=request.return_text_in_logprobs, asked_ids=asked.token_ids
        )

    async def _prompts(self, request: GenerateRequest) -> tuple[list[PromptTokens], bool]:
        """Token ids of each prompt, and whether they came as a list."""
        if (request.text is None) == (request.input_ids is None):
            raise bad_request("text", "text: exactly one of text and input_ids is needed")
        if request.input_ids is not None:
            ids = request.input_ids
            is_batch = len(ids) > 0 and isinstance(ids[0], list | array)
            prompts: Any = ids if is_batch else [ids]
        else:
            is_batch = isinstance(request.text, list)
            texts: Any = request.text if is_batch else [request.text]
            self._check_batch(len(texts), "text")
            prompts = [
                await self._generator.encode(
                    text,
                    param="text",
                    add_special_tokens=request.add_special_tokens,
                    parse_special_tokens=request.parse_special_tokens,
                )
                for text in texts
            ]
        self._check_batch(len(prompts), "input_ids")
        return prompts, is_batch

    def _check_batch(self, num_prompts: int, param: str) -> None:
        if not 1 <= num_prompts <= self._limits.max_batch:
            message = f"{param}: a batch must hold 1 to {self._limits.max_batch} prompts, got {num_prompts}"
            raise bad_request(param, message)

    def _per_prompt(self, request: GenerateRequest, num_prompts: int, *, is_batch: bool) -> list[SamplingInput]:
        given = request.sampling_params
        if isinstance(given, SamplingInput):
            return [given] * num_prompts
        if not is_batch or len(given) != num_prompts:
            message = f"sampling_params: a list must have one item for each of the {num_prompts} prompts"
            raise bad_request("sampling_params", message)
        return given

    async def _grammars(self, given: SamplingInput | list[SamplingInput], num_prompts: int) -> list[Grammar | None]:
        """The grammar of each prompt's answers."""
        if isinstance(given, SamplingInput):
            return [await self._grammar(given, "sampling_params.")] * num_prompts
        return [await self._grammar(item, f"sampling_params[{i}].") for i, item in enumerate(given)]

    async def _grammar(self, given: SamplingInput, prefix: str) -> Grammar | None:
        grammar = await self._generator.grammars.of(given, prefix=prefix)
        check_no_minimum(given.min_new_tokens, grammar, name=f"{prefix}min_new_tokens")
        return grammar

    def _asked_ids(self, request: GenerateRequest, num_prompts: int, *, is_batch: bool) -> list[tuple[int, ...]]:
        """`token_ids_logprob` of each prompt."""
        given: Any = request.token_ids_logprob
        if not given or not isinstance(given[0], list):
            return [tuple(given)] * num_prompts
        if not is_batch or len(given) != num_prompts:
            message = f"token_ids_logprob: lists of ids need a batch, with one list for each of {num_prompts} prompts"
            raise bad_request("token_ids_logprob", message)
        return [tuple(ids) for ids in given]

    def _adapters(self, given: str | list[str | None] | None, num_prompts: int, *, is_batch: bool) -> list[str]:
        """The LoRA adapter of each prompt; empty for none. ApiError 404 for one that is not loaded."""
        if isinstance(given, list) and (not is_batch or len(given) != num_prompts):
            message = f"lora_path: a list must have one name or null for each of the {num_prompts} prompts of a batch"
            raise bad_request("lora_path", message)
        names = [name or "" for name in given] if isinstance(given, list) else [given or ""] * num_prompts
        loaded = self._model.adapters() if any(names) else {}
        for name in names:
            if name and name not in loaded:
                raise adapter_not_found(name)
        return names

    def _requests(
        self,
        request: GenerateRequest,
        prompt: PromptTokens,
        given: SamplingInput,
        asked_ids: tuple[int, ...],
        adapter: str,
    ) -> list[TextRequest]:
        """The n requests of one prompt, without rids."""
        sampling = native_sampling(given, self._model)
        param = "text" if request.input_ids is None else "input_ids"
        prompt_ids = check_prompt(prompt, self._model, param=param, is_prefill=sampling.max_new_tokens == 0)
        sampling = fit(sampling, len(prompt_ids), self._model)
        logprobs = self._logprobs(request, len(prompt_ids), asked_ids)
        options, text = structs.replace(request.engine_options(), lora_name=adapter), given.text_options()
        return [
            TextRequest(
                rid="",
                prompt_ids=prompt_ids,
                sampling=for_sample(sampling, index),
                logprobs=logprobs,
                options=options,
                text=text,
                engine=request.engine,
                is_streaming=request.stream,
            )
            for index in range(given.n)
        ]

    def _logprobs(
        self, request: GenerateRequest, num_prompt_tokens: int, asked_ids: tuple[int, ...]
    ) -> LogprobParams | None:
        if not request.return_logprob:
            return None
        start, vocab_size = request.logprob_start_len, self._model.vocab_size
        if start > num_prompt_tokens:
            message = f"logprob_start_len: must be from -1 to the prompt's length ({num_prompt_tokens})"
            raise bad_request("logprob_start_len", message)
        if any(not 0 <= token_id < vocab_size for token_id in asked_ids):
            message = f"token_ids_logprob: token ids must be from 0 to {vocab_size - 1}"
            raise bad_request("token_ids_logprob", message)
        return LogprobParams(
            top=request.top_logprobs_num,
            token_ids=asked_ids,
            prompt_start=start if start < num_prompt_tokens else -1,
        )


def native_sampling(given: SamplingInput, model: ModelFacts) -> SamplingParams:
    """The engine's parameters for `sampling_params` of /generate. InvalidRequest."""
    return engine_sampling(
        given,
        model,
        max_new_tokens=given.max_new_tokens,
        min_new_tokens=given.min_new_tokens,
        seed=given.sampling_seed,
        min_tokens_name="min_new_tokens",
    )


class NativeBatch:
    """Running generations of one body; `is_list` says whether the answer is a list."""

    def __init__(self, *, is_list: bool) -> None:
        self.answers: list[NativeAnswer] = []
        self.is_list = is_list

    async def collect(self) -> Json | list[Json]:
        """The whole answer. Raises EngineGone, ApiError."""
        await run_all([answer.generation for answer in self.answers])
        results = [answer.whole() for answer in self.answers]
        return results if self.is_list else results[0]

    async def stream(self) -> AsyncGenerator[Json]:
        """Answers so far, as dicts. If there are several, each has its `index`."""
        async with aclosing(self._merged()) as news:
            async for chunks in news:
                answers = [(index, self.answers[index].whole()) for index, _ in chunks]
                for index, answer in answers:
                    yield answer | {"index": index} if self.is_list else answer

    async def events(self) -> AsyncGenerator[bytes]:
        """The same as server-sent events, without the closing [DONE]."""
        async with aclosing(self._merged()) as news:
            async for chunks in news:
                yield b"".join(
                    self.answers[index].event(chunk, index=index if self.is_list else None) for index, chunk in chunks
                )

    def _merged(self) -> AsyncGenerator[list[tuple[int, TextChunk]]]:
        return merge([answer.generation for answer in self.answers])

    def close(self) -> None:
        """Abort what still runs."""
        for answer in self.answers:
            answer.generation.close()


def _rids(given: str | list[str] | None, num_requests: int, *, is_list: bool) -> list[str]:
    """One rid for each request. A single rid given for several requests becomes their prefix."""
    if isinstance(given, list):
        if len(given) != num_requests or len(set(given)) != num_requests:
            message = f"rid: a list must hold {num_requests} different names, one for each answer"
            raise bad_request("rid", message)
        return given
    name = given or uuid.uuid4().hex
    return [f"{name}_{index}" for index in range(num_requests)] if is_list else [name]
