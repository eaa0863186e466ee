"""The vocabulary of a tokenizer as grammars see it."""

from collections.abc import Iterable
from functools import partial

from headwater.grammars.vocabulary import Vocabulary
from headwater.tokenization.tokenizer import Tokenizer


def grammar_vocabulary(tokenizer: Tokenizer, *, vocab_size: int, end_ids: Iterable[int]) -> Vocabulary:
    """The bytes of the tokens below `vocab_size`, the model's logits. `end_ids`: all of the model's end tokens."""
    ends = [token_id for token_id in end_ids if token_id < vocab_size]
    if not ends:
        raise ValueError("the model has no end token, without which no answer can end by its grammar")
    special = tokenizer.spelling.special_ids | set(ends)
    return Vocabulary(
        tokens=[tokenizer.token_bytes(token_id) for token_id in range(vocab_size)],
        special_ids=frozenset(token_id for token_id in special if token_id < vocab_size),
        end_id=ends[0],
        encode=partial(tokenizer.encode, add_special_tokens=False, parses_special=False),
    )
