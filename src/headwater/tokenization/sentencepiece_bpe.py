"""SentencePiece's BPE from pieces and scores, for any kind of file."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

_SPACE = "\u2581"


def sentencepiece_bpe(
    tokens: Sequence[str], scores: Sequence[float], *, unknown_id: int | None, has_space_prefix: bool
) -> Tokenizer:
    """A tokenizer that treats the text as one word and merges by score. ValueError if it cannot be built."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(
        bpe(
            vocab=vocabulary,
            merges=_merges_from_scores(vocabulary, scores),
            unk_token=None if unknown_id is None else tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces_to_marks = normalizers.Replace(" ", _SPACE)
    marks_to_text: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces_to_marks])
        marks_to_text.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        backend.normalizer = spaces_to_marks
    backend.decoder = decoders.Sequence(marks_to_text)
    return backend


def bpe(**parameters: Any) -> models.BPE:
    """The library's model, with its errors as ValueError."""
    try:
        return models.BPE(**parameters)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  it raises nothing narrower, and its panics are not Exceptions
        raise ValueError(f"tokenizer.ggml.merges: {error}") from None


def _merges_from_scores(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token, in the order of falling scores."""
    ranked = sorted(vocabulary, key=lambda token: (-scores[vocabulary[token]], vocabulary[token]))
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
