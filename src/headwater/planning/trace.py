"""Workloads as data: requests with their times, prompts as tokens or as named pieces, and conversations.

A trace file has one JSON object a line, in any order:

| field | meaning |
|---|---|
| `arrival_s` | when the request is sent; in a session not before the answer to the one before it |
| `output_tokens` | how many tokens it generates |
| `prompt_ids` | its token ids, or instead: |
| `pieces` | a list of [name, tokens]: what has the same name begins with the same tokens everywhere |
| `new_tokens` | so many tokens of its own, after the others |
| `session` | requests with the same session are turns of a conversation: each begins with all before it |
| `cache_salt` | its tenant |

Lines of the Mooncake traces (`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512-token blocks)
are read, too.
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


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A part of a prompt: the first `num_tokens` tokens of what `name` stands for."""

    name: str
    num_tokens: int


class PlannedRequest(msgspec.Struct, frozen=True, rename={"num_output_tokens": "output_tokens"}):
    """One line of a trace; see the module's text."""

    arrival_s: float
    num_output_tokens: int
    prompt_ids: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    new_tokens: int = 0
    session: str = ""
    cache_salt: str = ""
    think_s: float = 0.0  # in a session: at least so long after the answer before it

    def own_tokens(self, number: int) -> Tokens:
        """The prompt without the turns before it. `number` is the request's place in the trace."""
        parts = [np.array(self.prompt_ids, dtype=np.int32)]
        parts += [tokens_of(piece.name, piece.num_tokens) for piece in self.pieces]
        if self.new_tokens:
            parts.append(tokens_of(f"\0request {number}", self.new_tokens))
        return np.concatenate(parts)

    @property
    def num_own_tokens(self) -> int:
        return len(self.prompt_ids) + sum(piece.num_tokens for piece in self.pieces) + self.new_tokens

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
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
    """The first `count` tokens of what `name` stands for, always the same. int32[count]."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).integers(_FIRST_TOKEN, _FIRST_TOKEN + _NUM_TOKENS, count, dtype=np.int32)


def read_trace(path: Path) -> list[PlannedRequest]:
    """All requests of a file, by arrival. Raises ValueError that names the line."""
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


def _blocks(line: _MooncakeLine) -> Iterator[Piece]:
    for index, block in enumerate(line.hash_ids):
        num_tokens = min(_BLOCK_TOKENS, line.input_length - index * _BLOCK_TOKENS)
        if num_tokens > 0:
            yield Piece(f"block {block}", num_tokens)
