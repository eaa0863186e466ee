"""What the engine needs of grammars: compiled in threads, then one matcher for each answer."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Matcher(Protocol):
    """The place of one answer in a grammar. It belongs to one request, and advances with the request's tokens."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches, and no further token can follow."""
        ...

    @property
    def error(self) -> str:
        """Why the matcher can no longer be used; empty while it can."""
        ...

    def accept(self, token_id: int) -> bool:
        """Advance by a token. False if the grammar does not allow it, or if there was an `error` before.

        A grammar that turns out too complex behind a token that it allows: True, and there is an `error`.
        """
        ...

    def copy(self) -> "Matcher":
        """A matcher at the same place, which advances by itself."""
        ...


class GrammarCompiler(Protocol):
    """Compiles grammars for one vocabulary, and computes the masks of its matchers."""

    def prepare(self) -> None:
        """Begin to read the vocabulary in a thread, so that the first grammar need not wait for it."""
        ...

    def compile(self, text: str) -> Matcher:
        """A matcher at the start of a grammar. Called in a thread; ValueError, for the client, if it is none."""
        ...

    def fill(self, matchers: Sequence[Matcher], masks: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Write the tokens that each matcher allows next to its row of masks, [M, words]. bool[M]: may the answer end?

        Bit t % 32 of word t // 32 stands for token t. End tokens are not among them. If a matcher fails, it has an
        `error` afterwards.
        """
        ...

    @property
    def num_words(self) -> int:
        """Words of a mask: ceil(vocab_size / 32)."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether the vocabulary has been read. Until then a compilation waits for it."""
        ...
