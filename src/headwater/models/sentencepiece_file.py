"""Reads SentencePiece's `tokenizer.model`: pieces with scores, and how text is split. No library, no torch.

It is one protocol buffer, `ModelProto`. Format: sentencepiece_model.proto in github.com/google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headwater.models.model_files import ModelFileError, read_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Piece(NamedTuple):
    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """`model_type` is `unigram`, `bpe`, `word` or `char`. `has_charsmap`: text is normalised by a table of rules."""

    pieces: tuple[Piece, ...]
    model_type: str
    has_byte_fallback: bool
    has_space_prefix: bool  # a space is put before the text
    removes_extra_spaces: bool
    has_charsmap: bool
    unknown_id: int
    bos_id: int
    eos_id: int


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in a `tokenizer.model`. ModelFileError if the file is of another kind or damaged."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(read_bytes(path)):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (LookupError, struct.error, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(path, "is no SentencePiece model, or is damaged") from None
    if not pieces:
        raise ModelFileError(path, "is no SentencePiece model: it holds no pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_MODEL_TYPES.get(trainer.get(3, 1), "unknown"),
        has_byte_fallback=bool(trainer.get(35, False)),
        has_space_prefix=bool(normalizer.get(3, True)),
        removes_extra_spaces=bool(normalizer.get(4, True)),
        has_charsmap=bool(normalizer.get(2, b"")),
        unknown_id=_signed(trainer.get(40, 0)),
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
    )


def _piece(content: bytes) -> Piece:
    found = dict(_fields(content))
    return Piece(found[1].decode("utf-8"), score=found.get(2, 0.0), kind=found.get(3, NORMAL))


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message, in order."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(content, at)
        elif wire == _FIXED32:
            (value,) = struct.unpack_from("<f", content, at)
            at += 4
        elif wire == _FIXED64:
            (value,) = struct.unpack_from("<d", content, at)
            at += 8
        elif wire == _BYTES:
            length, at = _varint(content, at)
            if at + length > len(content):
                raise IndexError
            value, at = content[at : at + length], at + length
        else:
            raise ValueError(f"unknown wire type {wire}")
        yield number, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
    """int32 fields hold negative numbers as 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
