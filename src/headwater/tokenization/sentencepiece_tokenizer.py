"""A tokenizer from SentencePiece's `tokenizer.model`, the format of the first Llama and Mistral models."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from headwater.models.model_files import ModelFileError
from headwater.models.sentencepiece_file import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece,
)
from headwater.tokenization.sentencepiece_bpe import sentencepiece_bpe

_LONGEST_PIECE = 1 << 12  # in characters; the ways to cut a piece grow with its square


def load_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The backend, and the named special tokens of the file (`bos_token`, `eos_token`, `unk_token`).

    ModelFileError for a damaged file, and for models that differ from Llama's: unigram models, and models with rules
    that change the text first.
    """
    model = read_sentencepiece(path)
    _refuse_other_kinds(path, model)
    tokens = [piece.text for piece in model.pieces]
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unknown_id}
    named = {name: tokens[token_id] for name, token_id in ids.items() if 0 <= token_id < len(tokens)}
    try:
        backend = sentencepiece_bpe(
            tokens,
            [piece.score for piece in model.pieces],
            unknown_id=model.unknown_id if "unk_token" in named else None,
            has_space_prefix=model.has_space_prefix,
        )
    except ValueError as error:
        raise ModelFileError(path, str(error)) from None
    special = [piece.text for piece in model.pieces if piece.kind in (CONTROL, UNKNOWN)]
    plain = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    return backend, named


def _refuse_other_kinds(path: Path, model: SentencePieceModel) -> None:
    if model.model_type != "bpe":
        raise ModelFileError(
            path, f"is a SentencePiece model of type {model.model_type!r}, only 'bpe' is read; add its tokenizer.json"
        )
    if model.has_charsmap or model.removes_extra_spaces:
        raise ModelFileError(path, "changes text by rules of its own before cutting it; add its tokenizer.json")
    if max(len(piece.text) for piece in model.pieces) > _LONGEST_PIECE:
        raise ModelFileError(path, f"holds a piece of more than {_LONGEST_PIECE} characters")
