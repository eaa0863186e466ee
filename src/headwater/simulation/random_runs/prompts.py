"""The prompts of random runs: prefixes that requests share, in the namespaces of tenants."""

import random
from itertools import accumulate

from headwater.simulation.engine_shape import VOCAB_SIZE
from headwater.simulation.random_runs.profiles import Profile

_NAMESPACES = (  # salts and keys for the requests of a run
    (("",), ("",)),
    (("", "", "", "salt"), ("", "", "key")),
)
_NUM_ASKED = 6  # prompts that may be asked again
_SKEW = 0.8  # of Zipf's law over the shared prefixes


class Prompts:
    """Draws prompts. `salts` and `keys` are the namespaces of the run, repeated by their frequency."""

    def __init__(self, source: random.Random, profile: Profile) -> None:
        self._source = source
        self._repeats = profile.repeats
        self._asked: list[list[int]] = []  # the newest prompts, if some are asked again
        self._stems = self._make_stems(source.choice(profile.num_stems))
        self._weights = list(accumulate(rank**-_SKEW for rank in range(1, len(self._stems) + 1)))
        self.salts, self.keys = source.choice(_NAMESPACES)

    def stem(self) -> list[int]:
        """One of the shared prefixes; the first ones are more frequent."""
        return self._source.choices(self._stems, cum_weights=self._weights)[0]

    def prompt(self) -> list[int]:
        """Usually a shared prefix or a part of it, then a few tokens. In some profiles perhaps one of the last ones."""
        if not self._repeats:
            return self._new_prompt()
        if not self._asked or self._source.random() >= self._repeats:
            self._asked = [*self._asked[1 - _NUM_ASKED :], self._new_prompt()]
            return self._asked[-1]
        return self._source.choice(self._asked)

    def _new_prompt(self) -> list[int]:
        if self._source.random() < 0.1:
            return self.tokens(self._source.randrange(1, 90))  # some are longer than the context
        stem = self.stem()
        cut = len(stem) if self._source.random() < 0.6 else self._source.randrange(1, len(stem) + 1)
        return stem[:cut] + self.tokens(self._source.randrange(6)) or [1]

    def tokens(self, count: int) -> list[int]:
        """Drawn as `randrange` draws them, without what it checks: most of what a workload draws are these."""
        draw, num_bits = self._source.getrandbits, VOCAB_SIZE.bit_length()
        tokens: list[int] = []
        while len(tokens) < count:
            token = draw(num_bits)
            if token < VOCAB_SIZE:
                tokens.append(token)
        return tokens

    def _make_stems(self, count: int) -> list[list[int]]:
        """Make `count` prefixes; many begin like another one."""
        stems: list[list[int]] = []
        for _ in range(count):
            head = self._source.choice(stems) if stems and self._source.random() < 0.6 else []
            head = head[: self._source.randrange(len(head) + 1)]
            stems.append(head + self.tokens(self._source.randrange(4, 45)))
        return stems
