"""The APIs that the load generator speaks: how a request is written, and how the events of its answer are read.

OpenAI's events carry text and no count of tokens, so each event with text counts as one token until the usage at the
end says how many there were. SGLang's events carry the count.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

Ids = list[int]
Messages = list[dict[str, str]]
Prompt = Messages | str | Ids


@dataclass(slots=True)
class Told:
    """What an answer said of itself."""

    text: str = ""
    output_ids: Ids = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error: str = ""


class AnswerReader(Protocol):
    """Reads one answer. ValueError for an event that is not of this API."""

    def take(self, event: bytes) -> int:
        """The number of new tokens in an event."""
        ...

    def told(self) -> Told:
        """After the last event."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What all requests have in common."""

    model: str
    temperature: float = 0.0
    ignores_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def common(self) -> dict[str, Any]:
        return {"temperature": self.temperature, **({"ignore_eos": True} if self.ignores_eos else {})}


class Api(Protocol):
    path: str
    takes_messages: bool
    takes_ids: bool
    returns_ids: bool

    def body(self, prompt: Prompt, num_tokens: int, settings: Settings) -> bytes: ...

    def reader(self) -> AnswerReader: ...


class ChatApi:
    """OpenAI's chat completions."""

    path = "/v1/chat/completions"
    takes_messages, takes_ids, returns_ids = True, False, False

    def body(self, prompt: Prompt, num_tokens: int, settings: Settings) -> bytes:
        return _openai_body({"messages": prompt}, num_tokens, settings)

    def reader(self) -> AnswerReader:
        return _OpenAiReader()


class CompletionsApi:
    """OpenAI's completions of a text or of token ids."""

    path = "/v1/completions"
    takes_messages, takes_ids, returns_ids = False, True, False

    def body(self, prompt: Prompt, num_tokens: int, settings: Settings) -> bytes:
        return _openai_body({"prompt": prompt}, num_tokens, settings)

    def reader(self) -> AnswerReader:
        return _OpenAiReader()


class GenerateApi:
    """SGLang's native API."""

    path = "/generate"
    takes_messages, takes_ids, returns_ids = False, True, True

    def body(self, prompt: Prompt, num_tokens: int, settings: Settings) -> bytes:
        sampling = settings.common() | {"max_new_tokens": num_tokens}
        source = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        return msgspec.json.encode(source | {"sampling_params": sampling, "stream": True} | settings.extra)

    def reader(self) -> AnswerReader:
        return _GenerateReader()


APIS: dict[str, Api] = {"chat": ChatApi(), "completions": CompletionsApi(), "generate": GenerateApi()}


def _openai_body(source: dict[str, Any], num_tokens: int, settings: Settings) -> bytes:
    fixed = {"model": settings.model, "max_tokens": num_tokens, "stream": True}
    options = {"stream_options": {"include_usage": True}}
    return msgspec.json.encode(source | fixed | options | settings.common() | settings.extra)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class _OpenAiReader:
    def __init__(self) -> None:
        self._texts: list[str] = []
        self._usage: _Usage | None = None
        self._error = ""
        self._is_finished = False

    def take(self, event: bytes) -> int:
        if event == b"[DONE]":
            return 0
        chunk = _CHUNK.decode(event)
        if chunk.error is not None:
            self._error = _message_of(chunk.error)
        self._usage = chunk.usage or self._usage
        num_tokens = 0
        for choice in chunk.choices or ():
            self._is_finished = self._is_finished or choice.finish_reason is not None
            text = choice.text
            if choice.delta is not None:
                text = choice.delta.content or choice.delta.reasoning_content or choice.delta.reasoning
            if text:
                self._texts.append(text)
                num_tokens += 1
            elif choice.finish_reason is not None and not self._texts:
                num_tokens += 1  # its tokens have no text: an end-of-sequence token, half a character
        return num_tokens

    def told(self) -> Told:
        if not self._error and not self._is_finished:
            self._error = "the stream ended before its answer"
        if self._usage is None:
            return Told(error=self._error or "the stream had no usage, so its tokens cannot be counted")
        details = self._usage.prompt_tokens_details
        return Told(
            text="".join(self._texts),
            num_prompt_tokens=self._usage.prompt_tokens,
            num_cached_tokens=(details and details.cached_tokens) or 0,
            num_output_tokens=self._usage.completion_tokens,
            error=self._error,
        )


class _Meta(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: Any = None


class _Generated(msgspec.Struct):
    meta_info: _Meta | None = None
    error: Any = None


class _LastGenerated(msgspec.Struct):
    text: str = ""
    output_ids: Ids = []


_GENERATED = msgspec.json.Decoder(_Generated)
_LAST_GENERATED = msgspec.json.Decoder(_LastGenerated)


class _GenerateReader:
    """Events repeat the answer so far: only the last one is read whole."""

    def __init__(self) -> None:
        self._meta = _Meta()
        self._last = b"{}"
        self._error = ""

    def take(self, event: bytes) -> int:
        if event == b"[DONE]":
            return 0
        found = _GENERATED.decode(event)
        if found.error is not None:
            self._error = _message_of(found.error)
        if found.meta_info is None:
            return 0
        num_tokens = found.meta_info.completion_tokens - self._meta.completion_tokens
        self._meta, self._last = found.meta_info, event
        return num_tokens

    def told(self) -> Told:
        reason = self._meta.finish_reason
        if not self._error and reason is None:
            self._error = "the stream ended before its answer"
        if isinstance(reason, dict) and reason.get("type") == "abort":
            self._error = self._error or f"aborted: {reason.get('message', '')}"
        last = _LAST_GENERATED.decode(self._last)
        return Told(
            text=last.text,
            output_ids=last.output_ids,
            num_prompt_tokens=self._meta.prompt_tokens,
            num_cached_tokens=self._meta.cached_tokens,
            num_output_tokens=self._meta.completion_tokens,
            error=self._error,
        )


def _message_of(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def refusal(status: int, text: str) -> str:
    """What an answer that is no stream says, in a line."""
    try:
        found = msgspec.json.decode(text.encode())
    except msgspec.DecodeError:
        found = None
    error = found.get("error", found.get("message")) if isinstance(found, dict) else None
    return f"{status}: {_message_of(error) if error else text[:200]}"
