"""Grammars without a parser: a pure function knows the tokens that each allows at each position."""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from headwater.grammars.matcher import Matcher
from headwater.simulation.fakes.canary import mix

_MASK = (1 << 64) - 1
BROKEN = "no grammar"


class FakeGrammar(msgspec.Struct, frozen=True):
    """A grammar of `num_tokens` tokens at most, a few of which are allowed at each position."""

    seed: int
    num_tokens: int
    fails_at: int = -1  # tokens before the mask that its matchers fail at

    @property
    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str) -> "FakeGrammar":
        """ValueError for a text that is no grammar."""
        return msgspec.json.decode(text, type=cls)

    def allowed_after(self, accepted: Sequence[int], *, vocab_size: int, end_ids: frozenset[int]) -> list[int]:
        """The tokens that may follow, ascending; the end aside. None if the grammar is complete."""
        if len(accepted) >= self.num_tokens:
            return []
        state = self._state(accepted)
        found = {mix(state + number & _MASK) % vocab_size for number in range(2 + state % 7)} - end_ids
        return sorted(found) or [next(token for token in range(vocab_size) if token not in end_ids)]

    def may_end_after(self, accepted: Sequence[int]) -> bool:
        return len(accepted) >= self.num_tokens or self._state(accepted) % 11 == 0

    def _state(self, accepted: Sequence[int]) -> int:
        newest = accepted[-1] + 1 if accepted else 0
        return mix(self.seed << 32 ^ len(accepted) << 16 ^ newest)


class FakeMatcher:
    """`grammars.matcher.Matcher` of a fake grammar."""

    def __init__(self, grammar: FakeGrammar, compiler: "FakeCompiler", accepted: Sequence[int] = ()) -> None:
        self.error = ""
        self.grammar = grammar
        self.accepted = list(accepted)
        self._compiler = compiler

    @property
    def is_complete(self) -> bool:
        return not self.allowed

    @property
    def allowed(self) -> list[int]:
        compiler = self._compiler
        return self.grammar.allowed_after(self.accepted, vocab_size=compiler.vocab_size, end_ids=compiler.end_ids)

    def accept(self, token_id: int) -> bool:
        if token_id not in self.allowed:
            return False
        self.accepted.append(token_id)
        return True

    def copy(self) -> "FakeMatcher":
        return FakeMatcher(self.grammar, self._compiler, self.accepted)


class FakeCompiler:
    """`grammars.matcher.GrammarCompiler` of fake grammars. Keeps which texts it has compiled."""

    def __init__(self, *, vocab_size: int, end_ids: frozenset[int]) -> None:
        self.vocab_size = vocab_size
        self.end_ids = end_ids
        self.compiled: set[str] = set()
        self.num_words = -(-vocab_size // 32)
        self.is_ready = True

    def prepare(self) -> None:
        """There is no vocabulary to read."""

    def compile(self, text: str) -> Matcher:
        grammar = FakeGrammar.parse(text)
        self.compiled.add(text)
        return FakeMatcher(grammar, self)

    def fill(self, matchers: Sequence[Matcher], masks: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        masks[:] = 0
        may_end = np.zeros(len(matchers), dtype=np.bool_)
        for row, matcher in enumerate(matchers):
            assert isinstance(matcher, FakeMatcher)
            if len(matcher.accepted) == matcher.grammar.fails_at:
                matcher.error = "the fake matcher fails"
            for token_id in matcher.allowed:
                masks[row, token_id // 32] |= np.uint32(1 << token_id % 32)
            may_end[row] = matcher.grammar.may_end_after(matcher.accepted)
        return may_end


def tokens_of(mask: npt.NDArray[np.uint32], vocab_size: int) -> list[int]:
    """The tokens that a mask allows, ascending."""
    bits = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:vocab_size]).tolist()


def choose_freely(total: int, vocab_size: int) -> int:
    """The next token where nothing limits it."""
    return mix(total & _MASK) % vocab_size


def choose_from(total: int, allowed: Sequence[int], *, favourites: Sequence[int] = ()) -> int:
    """The next token, a function of all KV (`total`) and of what is allowed. Every third choice is a favourite."""
    assert allowed, "a mask allows nothing"
    number = mix(total & _MASK)
    liked = [token for token in favourites if token in allowed] if number % 3 == 0 else []
    return (liked or allowed)[number // 3 % len(liked or allowed)]
