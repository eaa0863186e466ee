"""The part of a vocabulary that the engine needs: special tokens, and the id of a token's text.

Read from the tokenizer's files without a tokenizer library, so that the engine loads none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from headwater.models.fields import Fields
from headwater.models.model_files import ModelFileError, is_there, read_bytes, read_json_if_there
from headwater.models.sentencepiece_file import CONTROL, UNKNOWN, read_sentencepiece

_GGUF_CONTROL = 3  # of tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Special tokens (control tokens, in GGUF's words) by text; `id_of` finds any token, None if there is none."""

    special: Mapping[str, int] = field(default_factory=dict)
    eos_token: str | None = None  # as the tokenizer's config names it
    id_of: Callable[[str], int | None] = lambda text: None


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool | None = False


class _TokenizerJson(msgspec.Struct):
    added_tokens: list[_AddedToken] | None = None
    model: msgspec.Raw = msgspec.Raw(b"null")


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] | None = None


def read_folder_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face folder: of `tokenizer.json`, else of the older files. Empty if it has none.

    ModelFileError for a file that is damaged.
    """
    config = read_json_if_there(folder / "tokenizer_config.json")
    named = {**read_json_if_there(folder / "special_tokens_map.json"), **config}
    ids, special, base = _files(folder)
    for token_id, token in added_tokens_of(Fields(config, source=str(folder / "tokenizer_config.json"))):
        ids.setdefault(token["content"], token_id)
        if token.get("special"):
            special.add(token["content"])
    special |= {text for name, value in named.items() if name.endswith("_token") and (text := _text(value))}

    def id_of(text: str) -> int | None:
        return ids[text] if text in ids else base().get(text)

    found = {text: token_id for text in special if (token_id := id_of(text)) is not None}
    return Vocabulary(special=found, eos_token=_text(named.get("eos_token")), id_of=id_of)


def gguf_special_tokens(metadata: Fields) -> dict[str, int]:
    """The control tokens in a GGUF's metadata (arrays included), by text."""
    tokens = metadata.texts("tokenizer.ggml.tokens")
    types = metadata.raw("tokenizer.ggml.token_type") or []
    if not isinstance(types, list):
        raise metadata.refuse("tokenizer.ggml.token_type must be an array")
    pairs = enumerate(zip(tokens, types, strict=False))
    return {token: index for index, (token, kind) in pairs if kind == _GGUF_CONTROL}


def _files(folder: Path) -> tuple[dict[str, int], set[str], Callable[[], Mapping[str, int]]]:
    """Added tokens, those that are special, and the vocabulary proper, which is large and parsed only if needed."""
    whole = folder / "tokenizer.json"
    if is_there(whole):
        parsed = _decode(whole, read_bytes(whole), _TokenizerJson)
        added = parsed.added_tokens or []
        ids = {token.content: token.id for token in added}
        return ids, {token.content for token in added if token.special}, cache(lambda: _base(whole, parsed.model))
    if is_there(folder / "tokenizer.model"):
        pieces = read_sentencepiece(folder / "tokenizer.model").pieces
        ids = {piece.text: index for index, piece in enumerate(pieces)}
        return ids, {piece.text for piece in pieces if piece.kind in (CONTROL, UNKNOWN)}, dict
    ids = {}
    for name in ("vocab.json", "added_tokens.json"):
        ids |= {key: value for key, value in read_json_if_there(folder / name).items() if isinstance(value, int)}
    return ids, set(), dict


def _base(path: Path, model: msgspec.Raw) -> Mapping[str, int]:
    vocab = (_decode(path, bytes(model), _Model | None) or _Model()).vocab or {}
    return vocab if isinstance(vocab, dict) else {text: index for index, (text, _) in enumerate(vocab)}


def _decode(path: Path, content: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"is no tokenizer ({error})") from None


def added_tokens_of(config: Fields) -> list[tuple[int, Mapping[str, Any]]]:
    """Id and description of each token in `added_tokens_decoder` of a tokenizer_config.json."""
    entries = config.inner("added_tokens_decoder")
    found = []
    for token_id in entries:
        token = entries.raw(token_id)
        if not (token_id.isdecimal() and isinstance(token, Mapping) and isinstance(token.get("content"), str)):
            raise config.refuse(f"added_tokens_decoder holds {token_id[:40]!r}, which is no token")
        found.append((int(token_id[:10]), token))
    return found


def _text(token: Any) -> str | None:
    """A token in a config is a string or an object with `content`."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and content else None
