"""A vocabulary as grammars see it: the bytes of every token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that the model can choose from. Special tokens match no text, only their own names in a grammar."""

    tokens: Sequence[bytes]  # by id, as many as the model has logits; empty: an id without a token
    special_ids: frozenset[int]
    end_id: int  # one of the end tokens; the others are the engine's business
    encode: Callable[[str], list[int]]  # the model's usual tokens of text in the midst of an answer
