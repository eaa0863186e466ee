"""The answers of Ollama's API: lines of JSON, or one object."""

import datetime
import time
from collections.abc import AsyncGenerator

from headwater.generation.answer_fields import Json, json_bytes
from headwater.generation.assistant_message import MessageDelta, ToolCallDelta
from headwater.generation.errors import ApiError
from headwater.http_api.error_shapes import ollama_error
from headwater.http_api.openai.conversation import arguments_object, deltas_of
from headwater.http_api.openai.format import ChatLogprobs
from headwater.http_api.openai.replies import Reply
from headwater.http_api.sse import StreamForm
from headwater.messages.generation import TokenLogprob


def _line(payload: Json) -> bytes:
    return json_bytes(payload) + b"\n"


def _error(error: ApiError) -> bytes:
    return _line(ollama_error(error))


OLLAMA_STREAM = StreamForm(error=_error, content_type=b"application/x-ndjson")
NS = 1_000_000_000


def now() -> str:
    """The time in Ollama's form."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


def loaded(model: str, *, is_chat: bool) -> Json:
    """The answer to a request that asks nothing: clients load a model so."""
    said: Json = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    return {"model": model, "created_at": now()} | said | {"done": True, "done_reason": "load"}


class OllamaAnswer:
    """The answer to one request of /api/chat or /api/generate. It owns the reply's generation."""

    def __init__(
        self, model: str, reply: Reply, *, is_chat: bool, arrived_s: float, logprobs: ChatLogprobs | None = None
    ) -> None:
        self._model = model
        self._reply = reply
        self._is_chat = is_chat
        self._arrived_s = arrived_s  # on the clock of time.monotonic
        self._logprobs = logprobs
        self._waiting: list[TokenLogprob] = []  # of tokens whose text is held back
        self._calls = WholeCalls()
        self._first_s: float | None = None  # when the first token came

    async def collect(self) -> Json:
        """Run to the end; the whole answer. Raises EngineGone, ApiError."""
        texts, thoughts, calls = [], [], []
        async for delta in self._deltas():
            texts.append(delta.content)
            thoughts.append(delta.reasoning)
            calls += self._calls.take(delta.tool_calls)
        calls += self._calls.end()
        return self._said("".join(texts), "".join(thoughts), calls) | self._ending() | self._take_logprobs()

    async def lines(self) -> AsyncGenerator[bytes]:
        """The answer in lines. Raises EngineGone, ApiError."""
        async for delta in self._deltas():
            calls = self._calls.take(delta.tool_calls)
            if delta.content or delta.reasoning or calls:
                said = self._said(delta.content, delta.reasoning, calls)
                yield _line(said | {"done": False} | self._take_logprobs())
        if calls := self._calls.end():
            yield _line(self._said("", "", calls) | {"done": False})
        yield _line(self._said("", "", []) | self._ending() | self._take_logprobs())

    def close(self) -> None:
        """Abort the request if it still runs."""
        self._reply.generation.close()

    async def _deltas(self) -> AsyncGenerator[MessageDelta]:
        async for delta, chunk in deltas_of(self._reply):
            if self._first_s is None:
                self._first_s = time.monotonic()
            self._waiting += chunk.logprobs
            yield delta

    def _take_logprobs(self) -> Json:
        """Of the tokens since they were taken last, if the request asked for them."""
        if self._logprobs is None or not self._waiting:
            return {}
        taken, self._waiting = self._waiting, []
        return {"logprobs": self._logprobs.content(taken)["content"]}

    def _said(self, text: str, thinking: str, calls: list[Json]) -> Json:
        thought = {"thinking": thinking} if thinking else {}
        called = {"tool_calls": calls} if calls else {}
        if self._is_chat:
            said: Json = {"message": {"role": "assistant", "content": text} | thought | called}
        else:
            said = {"response": text} | thought
        return {"model": self._model, "created_at": now()} | said

    def _ending(self) -> Json:
        generation = self._reply.generation
        finish = generation.finish
        assert finish is not None, "it has run to its end"
        ended_s = time.monotonic()
        first_s = self._first_s or ended_s
        return {
            "done": True,
            "done_reason": finish.type,
            "total_duration": ns(ended_s - self._arrived_s),
            "load_duration": 0,
            "prompt_eval_count": generation.num_prompt_tokens,
            "prompt_eval_duration": ns(first_s - self._arrived_s),
            "eval_count": len(generation.token_ids),
            "eval_duration": ns(ended_s - first_s),
        }


class WholeCalls:
    """Puts calls together: Ollama's clients get each call whole, its arguments as an object."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._open: tuple[str | None, str] | None = None  # id and name of the call that grows
        self._pieces: list[str] = []

    def take(self, deltas: tuple[ToolCallDelta, ...]) -> list[Json]:
        """The calls that ended."""
        ended: list[Json] = []
        for delta in deltas:
            if delta.name is not None:
                ended += self.end()
                self._open = delta.id, delta.name
            self._pieces.append(delta.arguments)
        return ended

    def end(self) -> list[Json]:
        """The last call, if there is one."""
        if self._open is None:
            return []
        (id, name), arguments = self._open, "".join(self._pieces)
        self._open, self._pieces = None, []
        self._num_calls += 1
        function = {"index": self._num_calls - 1, "name": name, "arguments": arguments_object(arguments)}
        return [{"id": id, "function": function}]


def ns(seconds: float) -> int:
    """Nanoseconds, in which Ollama reports."""
    return round(seconds * NS)
