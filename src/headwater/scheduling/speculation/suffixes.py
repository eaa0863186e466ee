"""Where the newest tokens of a request occurred before in its own text."""

import numpy as np

from headwater.cache.lease import TokenSequence
from headwater.messages.base import TokenIds

GRAM = 3  # tokens that must agree
_ID_BITS = 21  # of a token id in a key of three; vocabularies are smaller
_MOST_COMPARED = 32  # tokens of a match; more say nothing more
_NUM_PLACES = 8  # earlier places that are compared
MAX_TOKENS = 1 << 15  # the newest ones, to which the index goes back to when it has become twice as long


class TokenSuffixes:
    """An index of the places of all runs of three tokens, each linked to the place before it, as in LZ77.

    A new token and a look-up cost the same however long the text is. Memory is bounded: far places are forgotten.
    """

    def __init__(self, tokens: TokenSequence, *, max_tokens: int = MAX_TOKENS) -> None:
        self._tokens = tokens
        self._max_tokens = max_tokens
        self._restart()

    def next_tokens(self, most: int) -> tuple[TokenIds, int]:
        """What followed the earlier place that agrees with most of the newest tokens, and how many agree.

        int32[at most `most`]; none if three tokens never occurred before. A text that repeats itself goes on
        repeating.
        """
        place, num_equal = self._best_place()
        if num_equal == 0:
            return self._tokens.view(0, 0), 0
        following = self._tokens.view(place + 1)
        if len(following) < most:  # the place is among the newest tokens: they are a period
            following = np.resize(following, most)
        return following[:most], num_equal

    def _best_place(self) -> tuple[int, int]:
        """The last position of the earlier run that agrees longest, and its length; (0, 0) if there is none."""
        self._take_new()
        end = len(self._tokens) - 1
        place = self._before[end - self._start] if end - self._start < len(self._before) else -1
        best, best_equal = 0, 0
        for _ in range(_NUM_PLACES):
            if place < self._start:
                break
            num_equal = self._num_equal(place, end)
            if num_equal > best_equal:
                best, best_equal = place, num_equal
                if num_equal == _MOST_COMPARED:
                    break
            place = self._before[place - self._start]
        return best, best_equal

    def _num_equal(self, place: int, end: int) -> int:
        """How many tokens up to `place` are those up to `end`."""
        count = min(_MOST_COMPARED, place + 1)
        differs = self._tokens.view(place + 1 - count, place + 1) != self._tokens.view(end + 1 - count, end + 1)
        return int(differs[::-1].argmax()) if differs.any() else count

    def _take_new(self) -> None:
        """Index the tokens that have come since."""
        if len(self._tokens) - self._start > 2 * self._max_tokens:
            self._restart()
        num_headless = min(GRAM - 1, len(self._tokens) - self._start)  # the first two tokens end no run
        self._before += [-1] * (num_headless - len(self._before))
        first = self._start + len(self._before)
        ids = self._tokens.view(max(self._start, first - GRAM + 1)).tolist()
        for position, (left, middle, right) in enumerate(zip(ids, ids[1:], ids[2:], strict=False), first):
            key = (left << 2 * _ID_BITS) | (middle << _ID_BITS) | right
            self._before.append(self._newest.get(key, -1))
            self._newest[key] = position

    def _restart(self) -> None:
        self._start = max(0, len(self._tokens) - self._max_tokens)
        self._newest: dict[int, int] = {}  # last position by the run's key
        self._before: list[int] = []  # by position from `_start` on: the last position of the same run before it
