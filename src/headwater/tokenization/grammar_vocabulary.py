"""The vocabulary of a tokenizer as grammars see it."""

from collections.abc import Iterable

from headwater.grammars.vocabulary import Vocabulary
from headwater.tokenization.text_encoder import TextEncoder

_MARK = "\x02"  # a character that no token joins with what follows


def grammar_vocabulary(encoder: TextEncoder, *, vocab_size: int, end_ids: Iterable[int]) -> Vocabulary:
    """The bytes of the tokens below `vocab_size`, the model's logits. `end_ids`: all of the model's end tokens."""
    ends = [token_id for token_id in end_ids if token_id < vocab_size]
    if not ends:
        raise ValueError("the model has no end token, without which no answer can end by its grammar")
    special = encoder.spelling.special_ids | set(ends)
    return Vocabulary(
        tokens=[encoder.spelling.spell(token_id) for token_id in range(vocab_size)],
        special_ids=frozenset(token_id for token_id in special if token_id < vocab_size),
        end_id=ends[0],
        encode=_InTheMidst(encoder),
    )


class _InTheMidst:
    """Encodes text that follows other text: SentencePiece puts a space before the first word of a text."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        first = b"".join(map(encoder.token_bytes, self._encode("a")))
        self._mark = "" if first == b"a" else _MARK
        self._num_marks = len(self._encode(self._mark))

    def __call__(self, text: str) -> list[int]:
        return self._encode(self._mark + text)[self._num_marks :]

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False, parses_special=False)
