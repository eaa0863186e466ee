"""The prompt of each request, as its API takes it: messages, one text, or token ids. Turns contain all earlier ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from headwater.bench.apis import Api, Ids, Messages, Prompt, Told
from headwater.bench.words import text_of
from headwater.planning.trace import PlannedRequest, tokens_of

FIRST_ID = 100  # below lie control tokens and, in small vocabularies, single bytes


@dataclass(frozen=True, slots=True)
class PromptWriter:
    """Makes prompts of planned lengths. Requests of another `salt` share nothing with these."""

    api: Api
    salt: str = ""
    words_per_token: float = 1.0
    vocab_size: int | None = None  # None: words; otherwise ids below it

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.vocab_size <= FIRST_ID:
            raise ValueError(f"vocab-size must be above {FIRST_ID}, found {self.vocab_size}")

    def of(self, api: Api, *, salt: str) -> "PromptWriter":
        """The same for another API, with other texts."""
        return replace(self, api=api, salt=salt)

    def with_words(self, words_per_token: float) -> "PromptWriter":
        return replace(self, words_per_token=words_per_token)

    def check(self, trace: Sequence[PlannedRequest]) -> None:
        """Raise ValueError if a request of the workload cannot be sent through this API."""
        has_ids = self.vocab_size is not None or any(request.prompt_ids for request in trace)
        if has_ids and not self.api.takes_ids:
            raise ValueError("prompts of token ids need --api completions or generate")
        sessions = [request.session for request in trace if request.session]
        if has_ids and not self.api.returns_ids and len(set(sessions)) < len(sessions):
            raise ValueError("turns of token ids need --api generate, whose answers have the ids of the text")

    def shared(self, request: PlannedRequest) -> Any:
        """The pieces that other requests begin with as well."""
        parts = [(f"{self.salt}/{piece.name}", piece.num_tokens) for piece in request.pieces]
        return self._ids(parts) if self.vocab_size is not None else self._text(parts)

    def own(self, request: PlannedRequest, number: int) -> Any:
        """What no other request has. `number` is the request's index in the workload."""
        parts = [(f"{self.salt}/request {number}", request.new_tokens)]
        return self._ids(parts) if self.vocab_size is not None else self._text(parts)

    def _text(self, parts: list[tuple[str, int]]) -> str:
        words = [(name, round(count * self.words_per_token)) for name, count in parts]
        return " ".join(text_of(name, max(1, count)) for name, count in words if count > 0)

    def _ids(self, parts: list[tuple[str, int]]) -> Ids:
        assert self.vocab_size is not None
        width = self.vocab_size - FIRST_ID
        return [FIRST_ID + int(token) % width for name, count in parts for token in tokens_of(name, count)]


class Conversation:
    """The turns so far of one session. `prompt` adds a turn, `answered` the answer to it."""

    def __init__(self, writer: PromptWriter) -> None:
        self._writer = writer
        self._messages: Messages = []
        self._text = ""
        self._ids: Ids = []

    def prompt(self, request: PlannedRequest, number: int) -> Prompt:
        """The whole prompt of the next turn."""
        if request.prompt_ids:
            self._ids += request.prompt_ids
            return list(self._ids)
        shared, own = self._writer.shared(request), self._writer.own(request, number)
        if self._writer.vocab_size is not None:
            self._ids += [*shared, *own]
            return list(self._ids)
        if self._writer.api.takes_messages:
            if shared and own and not self._messages:
                self._messages.append({"role": "system", "content": shared})
                shared = ""
            self._messages.append({"role": "user", "content": _joined(shared, own)})
            return list(self._messages)
        self._text = _joined(self._text, _joined(shared, own))
        return self._text

    def answered(self, told: Told) -> None:
        if self._ids:
            self._ids += told.output_ids
        elif self._messages:
            self._messages.append({"role": "assistant", "content": told.text})
        else:
            self._text += told.text


def _joined(before: str, after: str) -> str:
    return f"{before} {after}" if before and after else before or after
