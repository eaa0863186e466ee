"""Whether bringing pages back costs less than computing them again, from what both were seen to cost here."""

_WEIGHT = 0.2  # of a new sample in the running averages
_OVERHEAD_S = 0.001  # of a load: at least a turn goes by before its request can start


class RestoreCost:
    """Running averages of seconds per token, of prefill and of restores. Unknown costs speak for restoring."""

    def __init__(self, *, min_tokens: int) -> None:
        self._min_tokens = min_tokens
        self._prefill_s: float | None = None
        self._restore_s: float | None = None

    def saw_prefill(self, num_tokens: int, seconds: float) -> None:
        self._prefill_s = _average(self._prefill_s, seconds / num_tokens)

    def saw_restore(self, num_tokens: int, seconds: float) -> None:
        self._restore_s = _average(self._restore_s, seconds / num_tokens)

    def is_worth(self, num_tokens: int) -> bool:
        """Whether a request should wait for `num_tokens` to be restored."""
        if num_tokens < self._min_tokens:
            return False
        if self._prefill_s is None or self._restore_s is None:
            return True
        return num_tokens * self._restore_s + _OVERHEAD_S < num_tokens * self._prefill_s


def _average(before: float | None, sample: float) -> float:
    return sample if before is None else before + _WEIGHT * (sample - before)
