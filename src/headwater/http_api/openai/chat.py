"""Chat completions: a conversation through the chat template, answered by an assistant's message."""

from collections.abc import AsyncGenerator
from typing import Any

from headwater.generation.answer_fields import json_bytes
from headwater.generation.chat_prompts import encode_messages
from headwater.generation.errors import bad_request
from headwater.generation.model_facts import ModelFacts
from headwater.generation.text_generation import TextChunk, TextGeneration, TextGenerator
from headwater.http_api.openai.batch import Heading, OpenAIBatch, check_model
from headwater.http_api.openai.format import ChatLogprobs, finish_fields
from headwater.http_api.openai.sampling import openai_sampling
from headwater.http_api.openai.schemas import ChatCompletionRequest
from headwater.messages.generation import LogprobParams, TokenLogprob

Json = dict[str, Any]


class Chat:
    """One running request of /v1/chat/completions."""

    def __init__(self, batch: OpenAIBatch, logprobs: ChatLogprobs | None) -> None:
        self._batch = batch
        self._logprobs = logprobs

    @classmethod
    async def start(cls, request: ChatCompletionRequest, generator: TextGenerator, model: ModelFacts) -> "Chat":
        """Check the request and send it. Raises ApiError (404 for an unknown model), EngineGone, RidInUse."""
        check_model(request.model, model)
        sampling = openai_sampling(request, model)
        if request.top_logprobs and not request.logprobs:
            raise bad_request("top_logprobs", "top_logprobs: needs logprobs to be true")
        prompt_ids = await encode_messages(request, generator)
        is_stream = request.stream
        heading = Heading.of(
            request,
            model,
            prefix="chatcmpl",
            object="chat.completion.chunk" if is_stream else "chat.completion",
        )
        batch = OpenAIBatch(request, heading)
        asked = LogprobParams(top=request.top_logprobs) if request.logprobs else None
        batch.start(generator, model, [prompt_ids], param="messages", sampling=sampling, logprobs=asked)
        return cls(batch, ChatLogprobs(generator.tokenizer) if request.logprobs else None)

    async def collect(self) -> Json:
        """The whole answer."""
        answer = await self._batch.collect()
        choices = [self._choice(index, g) for index, g in enumerate(self._batch.generations)]
        return answer | {"choices": choices}

    def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        choices = [_ChatChoice(self._batch, index, self._logprobs) for index in range(len(self._batch.generations))]
        return self._batch.events(choices)

    def close(self) -> None:
        self._batch.close()

    def _choice(self, index: int, generation: TextGeneration) -> Json:
        assert generation.finish is not None, "it has run to its end"
        message = {"role": "assistant", "content": generation.text, "refusal": None, "tool_calls": None}
        logprobs = self._logprobs.content(generation.logprobs) if self._logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs} | finish_fields(generation.finish)


class _ChatChoice:
    """The chunks of one choice: the role first, then pieces of content, at last the finish reason."""

    def __init__(self, batch: OpenAIBatch, index: int, logprobs: ChatLogprobs | None) -> None:
        self._batch = batch
        self._index = index
        self._logprobs = logprobs
        self._writer = batch.heading.writer(index, has_usage=batch.request.stream_options.include_usage)
        self._has_begun = False
        self._untold: list[TokenLogprob] = []  # of tokens whose text is held back

    def events(self, chunk: TextChunk) -> bytes:
        head = b""
        extra = self._batch.continuous_usage(self._index)
        if not self._has_begun:
            self._has_begun = True
            head = self._writer.event(_ROLE, extra=extra)
        if self._logprobs is not None:
            self._untold.extend(chunk.logprobs)
        if not chunk.text and not (chunk.finish is not None and self._untold):
            return head
        delta = b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null' % (
            json_bytes(chunk.text),
            self._told_logprobs(),
        )
        return head + self._writer.event(delta, extra=extra)

    def last_event(self, extra: Json) -> bytes:
        finish = self._batch.generations[self._index].finish
        assert finish is not None
        fields = {"delta": {}, "logprobs": None} | finish_fields(finish)
        return self._writer.event(json_bytes(fields)[1:-1], extra=extra)

    def _told_logprobs(self) -> bytes:
        if self._logprobs is None:
            return b"null"
        told, self._untold = self._untold, []
        return json_bytes(self._logprobs.content(told))


_ROLE = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
