"""Workloads as data: requests with their times, prompts (tokens or named pieces), and conversations.

A trace file has one JSON object a line, in any order:

| field | meaning |
|---|---|
| `arrival_s` | time of the request; in a session, it is sent after the answer to the previous request |
| `output_tokens` | number of generated tokens |
| `prompt_ids` | token ids of the prompt; or instead: |
| `pieces` | a list of [name, tokens]; pieces with the same name begin with the same tokens everywhere |
| `new_tokens` | number of unique tokens after the pieces |
| `session` | requests of one session are turns of a conversation: each begins with all earlier turns |
| `cache_salt` | the tenant |

Lines of the Mooncake traces are accepted as well (`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of
512-token blocks).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

_BLOCK_TOKENS = 512
_FIRST_TOKEN, _NUM_TOKENS = 1000, 30_000
Tokens = npt.NDArray[np.int32]


class PromptPiece(msgspec.Struct, frozen=True, array_like=True):
    """A part of a prompt: the first `num_tokens` tokens of the text called `name`."""

    name: str
    num_tokens: int


class PlannedRequest(msgspec.Struct, frozen=True, rename={"num_output_tokens": "output_tokens"}):
    """One line of a trace; the module's docstring describes the fields."""

    arrival_s: float
    num_output_tokens: int
    prompt_ids: tuple[int, ...] = ()
    pieces: tuple[PromptPiece, ...] = ()
    new_tokens: int = 0
    session: str = ""
    cache_salt: str = ""
    think_s: float = 0.0  # in a session: least time after the previous answer

    def own_tokens(self, number: int) -> Tokens:
        """The prompt without earlier turns. `number` is the request's index in the trace."""
        parts = [np.array(self.prompt_ids, dtype=np.int32)]
        parts += [tokens_of(piece.name, piece.num_tokens) for piece in self.pieces]
        if self.new_tokens:
            parts.append(tokens_of(f"\0request {number}", self.new_tokens))
        return np.concatenate(parts)

    @property
    def num_own_tokens(self) -> int:
        return len(self.prompt_ids) + sum(piece.num_tokens for piece in self.pieces) + self.new_tokens

    def check(self) -> None:
        """Raise ValueError for invalid fields."""
        if not 0 <= self.arrival_s < float("inf"):
            raise ValueError(f"arrival_s must be at least 0, found {self.arrival_s}")
        if self.num_output_tokens < 0:
            raise ValueError(f"output_tokens must be at least 0, found {self.num_output_tokens}")
        if self.new_tokens < 0 or any(piece.num_tokens < 1 for piece in self.pieces):
            raise ValueError("new_tokens must be at least 0, and the tokens of a piece at least 1")
        if self.prompt_ids and self.pieces:
            raise ValueError("prompt_ids and pieces exclude each other")
        if not self.num_own_tokens:
            raise ValueError("one of prompt_ids, pieces and new_tokens is needed")


def tokens_of(name: str, count: int) -> Tokens:
    """The first `count` tokens of the text called `name`, always the same. int32[count]."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).integers(_FIRST_TOKEN, _FIRST_TOKEN + _NUM_TOKENS, count, dtype=np.int32)


def read_trace(path: Path) -> list[PlannedRequest]:
    """All requests of a file, in the order of arrival. Raises ValueError that names the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"trace: {error}") from None
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = _read_line(line)
            request.check()
        except ValueError as error:  # msgspec's errors are ValueErrors
            raise ValueError(f"trace, line {number}: {error}") from None
        requests.append(request)
    if not requests:
        raise ValueError(f"trace {path.name} holds no request")
    return sorted(requests, key=lambda request: request.arrival_s)


def _read_line(line: bytes) -> PlannedRequest:
    raw: Any = msgspec.json.decode(line)
    if isinstance(raw, dict) and "hash_ids" in raw:
        return _from_mooncake(msgspec.convert(raw, _MooncakeLine))
    return msgspec.convert(raw, PlannedRequest)


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def _from_mooncake(line: _MooncakeLine) -> PlannedRequest:
    return PlannedRequest(
        arrival_s=line.timestamp / 1000,
        num_output_tokens=line.output_length,
        pieces=tuple(_blocks(line)),
    )


def _blocks(line: _MooncakeLine) -> Iterator[PromptPiece]:
    for index, block in enumerate(line.hash_ids):
        num_tokens = min(_BLOCK_TOKENS, line.input_length - index * _BLOCK_TOKENS)
        if num_tokens > 0:
            yield PromptPiece(f"block {block}", num_tokens)
