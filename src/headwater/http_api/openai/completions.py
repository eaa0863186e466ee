"""Completions: prompts as text or token ids, continued; with `echo` also scored."""

from collections.abc import AsyncGenerator
from typing import Any

from headwater.generation.answer_fields import json_bytes
from headwater.generation.model_facts import ModelFacts, RequestLimits
from headwater.generation.sampling import check_prompt
from headwater.generation.text_generation import TextChunk, TextGeneration, TextGenerator
from headwater.http_api.openai.batch import Heading, OpenAIBatch, check_batch, check_model
from headwater.http_api.openai.format import CompletionLogprobs, finish_fields
from headwater.http_api.openai.sampling import openai_sampling
from headwater.http_api.openai.schemas import CompletionRequest
from headwater.messages.base import TokenIds
from headwater.messages.generation import LogprobParams, TokenLogprob
from headwater.tokenization.tokenizer import Tokenizer

Json = dict[str, Any]


class Completion:
    """One running request of /v1/completions."""

    def __init__(self, batch: OpenAIBatch, echoes: list[str], tokenizer: Tokenizer) -> None:
        self._batch = batch
        self._echoes = echoes  # what each choice's text begins with
        self._tokenizer = tokenizer
        request = batch.request
        assert isinstance(request, CompletionRequest)
        self._has_logprobs = request.logprobs is not None

    @classmethod
    async def start(
        cls, request: CompletionRequest, generator: TextGenerator, model: ModelFacts, limits: RequestLimits
    ) -> "Completion":
        """Check the request and send it. Raises ApiError (404 for an unknown model), EngineGone, RidInUse."""
        check_model(request.model, model)
        sampling = openai_sampling(request, model)
        prompts, texts = await _prompts(request, generator, model, limits)
        asked = None
        if request.logprobs is not None:
            asked = LogprobParams(top=request.logprobs, prompt_start=0 if request.echo else -1)
        heading = Heading.of(request, model, prefix="cmpl", object="text_completion")
        batch = OpenAIBatch(request, heading)
        batch.start(generator, model, prompts, param="prompt", sampling=sampling, logprobs=asked)
        echoes = [text if request.echo else "" for text in texts for _ in range(request.n)]
        return cls(batch, echoes, generator.tokenizer)

    async def collect(self) -> Json:
        """The whole answer."""
        answer = await self._batch.collect()
        choices = [self._choice(index, g) for index, g in enumerate(self._batch.generations)]
        return answer | {"choices": choices}

    def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        choices = [
            _CompletionChoice(
                self._batch, index, echo=echo, logprobs=self._new_logprobs() if self._has_logprobs else None
            )
            for index, echo in enumerate(self._echoes)
        ]
        return self._batch.events(choices)

    def close(self) -> None:
        self._batch.close()

    def _new_logprobs(self) -> CompletionLogprobs:
        return CompletionLogprobs(self._tokenizer)

    def _choice(self, index: int, generation: TextGeneration) -> Json:
        assert generation.finish is not None, "it has run to its end"
        logprobs = None
        if self._has_logprobs:
            logprobs = self._new_logprobs().columns([*generation.prompt_logprobs, *generation.logprobs])
        text = self._echoes[index] + generation.text
        return {"index": index, "text": text, "logprobs": logprobs} | finish_fields(generation.finish)


class _CompletionChoice:
    """The chunks of one choice: pieces of text, at last the finish reason."""

    def __init__(self, batch: OpenAIBatch, index: int, *, echo: str, logprobs: CompletionLogprobs | None) -> None:
        self._batch = batch
        self._index = index
        self._echo = echo
        self._logprobs = logprobs
        self._writer = batch.heading.writer(index, has_usage=batch.request.stream_options.include_usage)
        self._has_begun = False
        self._untold: list[TokenLogprob] = []  # of tokens whose text is held back

    def events(self, chunk: TextChunk) -> bytes:
        text = chunk.text
        if not self._has_begun:
            self._has_begun = True
            text = self._echo + text
            if self._logprobs is not None:
                self._untold.extend(self._batch.generations[self._index].prompt_logprobs)
        if self._logprobs is not None:
            self._untold.extend(chunk.logprobs)
        if not text and not (chunk.finish is not None and self._untold):
            return b""
        logprobs = b"null"
        if self._logprobs is not None:
            logprobs = json_bytes(self._logprobs.columns(self._untold))
            self._untold = []
        choice = b'"text":%b,"logprobs":%b,"finish_reason":null' % (json_bytes(text), logprobs)
        return self._writer.event(choice, extra=self._batch.continuous_usage(self._index))

    def last_event(self, extra: Json) -> bytes:
        finish = self._batch.generations[self._index].finish
        assert finish is not None
        fields = {"text": "", "logprobs": None} | finish_fields(finish)
        return self._writer.event(json_bytes(fields)[1:-1], extra=extra)


async def _prompts(
    request: CompletionRequest, generator: TextGenerator, model: ModelFacts, limits: RequestLimits
) -> tuple[list[TokenIds], list[str]]:
    """Checked token ids and text of each prompt; the texts are made up only if they are echoed."""
    given: Any = request.prompt
    is_one = isinstance(given, str) or not given or isinstance(given[0], int)
    items = [given] if is_one else given
    check_batch(len(items), limits.max_batch, param="prompt")
    prompts: list[TokenIds] = []
    texts: list[str] = []
    for item in items:
        if isinstance(item, str):
            ids = await generator.encode(
                item,
                param="prompt",
                add_special_tokens=request.add_special_tokens,
                parse_special_tokens=request.parse_special_tokens,
            )
        else:
            ids = item
        prompts.append(check_prompt(ids, model, param="prompt", is_prefill=request.max_tokens == 0))
        if isinstance(item, str):
            texts.append(item)
        else:
            skips = request.skip_special_tokens
            texts.append(generator.tokenizer.decode(item, skip_special_tokens=skips) if request.echo else "")
    return prompts, texts
