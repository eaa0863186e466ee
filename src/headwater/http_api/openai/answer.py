"""One request of /v1/chat/completions or /v1/completions from its start to its answer, whole or as a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from msgspec import structs

from headwater.generation.answer_fields import Json, json_bytes
from headwater.generation.errors import aborted, adapter_not_found, model_not_found
from headwater.generation.model_facts import ModelFacts
from headwater.generation.sampling import PromptTokens, check_no_minimum, check_prompt, fit, for_sample
from headwater.generation.text_generation import TextChunk, TextGeneration, TextGenerator, merge, run_all
from headwater.generation.text_request import TextOptions, TextRequest
from headwater.http_api.openai.format import extension, metadata, usage_of
from headwater.http_api.openai.schemas import OpenAIRequest
from headwater.messages.generation import Finish, Grammar, LogprobParams, SamplingParams


class Choice(Protocol):
    """One choice of the answer. It is written whole or piece by piece, never both."""

    generation: TextGeneration

    @property
    def num_reasoning_tokens(self) -> int:
        """Generated tokens that belong to the thinking."""
        ...

    def whole(self) -> Json:
        """The choice after its generation has ended."""
        ...

    def pieces(self, chunk: TextChunk) -> Sequence[bytes]:
        """JSON of what is new, one item for each event, without braces, index and finish reason; may be empty."""
        ...

    def end(self, finish: Finish) -> bytes:
        """JSON of the last piece, which has the finish reason."""
        ...


def check_model(name: str, model: ModelFacts) -> str:
    """The LoRA adapter that is named; empty for the model itself. Raises ApiError 404 if neither is served."""
    adapter = model.adapter_of(name)
    if adapter is None:
        raise model_not_found(name, model.served_name)
    return adapter


def adapter_of(request: OpenAIRequest, model: ModelFacts) -> str:
    """The LoRA adapter of a request: `lora_path` is SGLang's name of it, `model` vLLM's. Raises ApiError 404."""
    if not request.lora_path:
        return check_model(request.model, model)
    if request.lora_path not in model.adapters():
        raise adapter_not_found(request.lora_path)
    return request.lora_path


class Envelope:
    """What every answer and every chunk of one request begins and ends with, encoded once."""

    def __init__(self, request: OpenAIRequest, model: ModelFacts, *, prefix: str, object: str) -> None:
        self.id = request.rid or f"{prefix}-{uuid.uuid4().hex}"  # also the rid, so that a client can abort by it
        self.fields: Json = {
            "id": self.id,
            "object": object,
            "created": int(time.time()),
            "model": adapter_of(request, model) or model.served_name,
        }
        self._start = b"data: " + json_bytes(self.fields)[:-1]
        self._end = b',"usage":null}\n\n' if request.stream_options.include_usage else b"}\n\n"

    def chunk(self, index: int, piece: bytes, *, extra: Json | None = None) -> bytes:
        """The event with one piece of the choice `index`; `extra` are fields beside the choices."""
        if not extra:
            return b'%b,"choices":[{"index":%d,%b}]%b' % (self._start, index, piece, self._end)
        end = b"}\n\n" if "usage" in extra else self._end
        return b'%b,"choices":[{"index":%d,%b}],%b%b' % (self._start, index, piece, json_bytes(extra)[1:-1], end)

    def usage_chunk(self, usage: Json) -> bytes:
        """The last event of a stream whose client asked for the usage."""
        return b"data: " + json_bytes(self.fields | {"choices": [], "usage": usage}) + b"\n\n"


def start_generations(
    request: OpenAIRequest,
    rid: str,
    generator: TextGenerator,
    model: ModelFacts,
    prompts: Sequence[PromptTokens],
    *,
    param: str,
    sampling: SamplingParams,
    logprobs: LogprobParams | None,
    text: TextOptions | None = None,
    grammar: Grammar | None = None,
) -> list[TextGeneration]:
    """Check the prompts and send everything: `request.n` generations for each prompt, in the order of the choices.

    The caller owns the generations. Raises InvalidRequest, EngineGone, RidInUse; then nothing runs.
    """
    check_no_minimum(sampling.min_new_tokens, grammar, name="min_tokens")
    is_prefill = sampling.max_new_tokens == 0
    checked = [check_prompt(prompt, model, param=param, is_prefill=is_prefill) for prompt in prompts]
    options, text = request.engine_options(), text or request.text_options()
    options = structs.replace(options, lora_name=adapter_of(request, model))
    is_single = len(prompts) * request.n == 1
    generations: list[TextGeneration] = []
    try:
        with generator.together():
            for prompt_ids in checked:
                text_request = TextRequest(
                    rid=rid,
                    prompt_ids=prompt_ids,
                    sampling=fit(sampling, len(prompt_ids), model),
                    logprobs=logprobs,
                    options=options,
                    grammar=grammar,
                    text=text,
                    engine=request.engine,
                    is_streaming=request.stream,
                )
                for sample in range(request.n):
                    name = rid if is_single else f"{rid}_{len(generations)}"
                    named = replace(text_request, rid=name, sampling=for_sample(text_request.sampling, sample))
                    generations.append(generator.start(named))
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    return generations


class OpenAIAnswer:
    """The answer to one body, whole or as a stream. It owns the generations, through its choices."""

    def __init__(
        self,
        request: OpenAIRequest,
        envelope: Envelope,
        choices: Sequence[Choice],
        *,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        """`prompt_ids` are reported beside the choices, in a stream once."""
        self._request = request
        self._prompt_ids: Json = {} if prompt_ids is None else {"prompt_token_ids": list(prompt_ids)}
        self._envelope = envelope
        self._choices = choices
        self._generations = [choice.generation for choice in choices]

    async def collect(self) -> Json:
        """Run to the end; the whole answer. Raises EngineGone, ApiError."""
        await run_all(self._generations)
        for generation in self._generations:
            self._raise_if_aborted(generation)
        n = self._request.n
        answer = self._envelope.fields | {"usage": self._usage()}
        answer["metadata"] = metadata(self._generations[0].meta)
        if self._request.return_cached_tokens_details:
            answer["sglext"] = extension(self._generations, n=n)
        answer |= self._prompt_ids
        return answer | {"choices": [{"index": i} | choice.whole() for i, choice in enumerate(self._choices)]}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, without the closing [DONE]."""
        async with aclosing(merge(self._generations)) as news:
            async for chunks in news:
                if events := b"".join([self._events_of(index, chunk) for index, chunk in chunks]):
                    yield events
                for index, _ in chunks:
                    self._raise_if_aborted(self._generations[index])
        if self._request.stream_options.include_usage:
            yield self._envelope.usage_chunk(self._usage())

    def close(self) -> None:
        """Abort what still runs."""
        for generation in self._generations:
            generation.close()

    def _events_of(self, index: int, chunk: TextChunk) -> bytes:
        is_error = chunk.finish is not None and self._is_error(chunk.finish)
        if is_error and not chunk.text:
            return b""  # the error comes next
        usage = self._continuous_usage(index)
        choice = self._choices[index]
        pieces = choice.pieces(chunk)
        events = b"".join([self._envelope.chunk(index, piece, extra=usage | self._take_prompt()) for piece in pieces])
        if chunk.finish is None or is_error:
            return events
        return events + self._envelope.chunk(index, choice.end(chunk.finish), extra=self._last_fields(index) | usage)

    def _usage(self) -> Json:
        num_reasoning = sum(choice.num_reasoning_tokens for choice in self._choices)
        return usage_of(self._generations, n=self._request.n, num_reasoning=num_reasoning)

    def _continuous_usage(self, index: int) -> Json:
        """The usage of one choice so far, if every chunk reports it."""
        if not self._request.stream_options.continuous_usage_stats:
            return {}
        choice = self._choices[index]
        return {"usage": usage_of([choice.generation], n=1, num_reasoning=choice.num_reasoning_tokens)}

    def _take_prompt(self) -> Json:
        """The prompt's ids, the first time."""
        taken, self._prompt_ids = self._prompt_ids, {}
        return taken

    def _last_fields(self, index: int) -> Json:
        generation = self._generations[index]
        fields: Json = {"metadata": metadata(generation.meta)}
        if self._request.return_cached_tokens_details:
            fields["sglext"] = extension([generation], n=1)
        return fields

    def _is_error(self, finish: Finish) -> bool:
        return finish.type == "abort" and not self._request.return_partial_on_abort

    def _raise_if_aborted(self, generation: TextGeneration) -> None:
        """An aborted answer is incomplete and must not look complete. Raises ApiError."""
        finish = generation.finish
        if finish is not None and self._is_error(finish):
            raise aborted(finish)
