"""How long drafts should be: how often drafted tokens are right, and what a row more costs a step."""

_WEIGHT = 0.15  # of one token in the estimate
_FIRST_WAIT = 32  # tokens without drafts, before a request tries again
_LONGEST_WAIT = 512
_HIGHEST = 0.98  # of estimates: no draft is surely right
_STEP_WEIGHT = 0.05  # of one step in the costs
_FIRST_SHARE = 1 / 12  # of a row in a step of one row, before steps were measured
_LEAST_SPREAD = 0.25  # variance of the steps' rows; below, their times show no cost of a row
_SLOWEST = 3.0  # times the mean: slower steps were disturbed


class Acceptance:
    """How often the next drafted token of a request is right, if those before it were."""

    def __init__(self, first: float) -> None:
        self.rate = first
        self._wait = _FIRST_WAIT
        self._num_waited = 0

    def accepted(self) -> None:
        """A drafted token was right."""
        self.rate = min(_HIGHEST, self.rate + _WEIGHT * (1 - self.rate))
        self._wait = _FIRST_WAIT

    def rejected(self) -> None:
        """A drafted token was wrong; those behind it say nothing."""
        self.rate -= _WEIGHT * self.rate

    def length(self, most: int, *, num_rows: int, row_share: float) -> int:
        """How many tokens to draft in a step of `num_rows` decodes, of whose time all rows have this share.

        As many as bring the most tokens a second. A request whose drafts do not pay tries one token now and then.
        """
        found = best_length(self.rate, most, num_rows=num_rows, row_share=row_share)
        return found or self.trial(row_share)

    def trial(self, least_rate: float) -> int:
        """1 now and then, as the length of a draft that does not pay, else 0. Drafts pay above `least_rate`."""
        if not self.is_due:
            self.pass_over()
            return 0
        self._num_waited = 0
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self.rate = max(self.rate, least_rate)  # if the token is wrong, drafts are off again
        return 1

    @property
    def is_due(self) -> bool:
        """Whether a trial is due with the next token."""
        return self._num_waited + 1 >= self._wait

    def pass_over(self) -> None:
        """A token had no draft."""
        self._num_waited += 1

    def gain(self, length: int, *, row_share: float) -> float:
        """Tokens that a draft of `length` is expected to bring, less those that its rows cost."""
        return sum(self.rate**place for place in range(1, length + 1)) - row_share * length


def best_length(rate: float, most: int, *, num_rows: int, row_share: float) -> int:
    """The length with the most tokens a second, if each token is right with the chance `rate`; 0 if no draft pays.

    The step is `num_rows` tokens in one unit of time. A row more takes `row_share / num_rows` of it.
    """
    tokens, time, chance = float(num_rows), 1.0, 1.0
    best = 0
    for length in range(1, most + 1):
        chance *= rate
        more, longer = tokens + chance, time + row_share / num_rows
        if more * time <= tokens * longer:
            break
        best, tokens, time = length, more, longer
    return best


class StepCost:
    """The time of steps of decodes as a + b * rows, fitted to the newest steps."""

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0  # means
        self._spread = self._slope_sum = 0.0  # of rows; of rows and seconds together
        self._num_seen = 0

    def saw(self, num_rows: int, seconds: float) -> None:
        """A step of this many decodes, drafts included, has taken so long."""
        if seconds <= 0:
            return
        if not self._num_seen:
            self._rows, self._seconds = num_rows, seconds
        self._num_seen += 1
        seconds = min(seconds, _SLOWEST * self._seconds)
        off_rows, off_seconds = num_rows - self._rows, seconds - self._seconds
        weight = max(_STEP_WEIGHT, 1 / self._num_seen)
        self._rows += weight * off_rows
        self._seconds += weight * off_seconds
        self._spread = (1 - weight) * (self._spread + weight * off_rows * off_rows)
        self._slope_sum = (1 - weight) * (self._slope_sum + weight * off_rows * off_seconds)

    @property
    def row_s(self) -> float:
        """Seconds of a row more; 0 while the steps' sizes show none."""
        return max(0.0, self._slope_sum / self._spread) if self._spread >= _LEAST_SPREAD else 0.0

    def seconds(self, num_rows: int) -> float:
        """The time of a step of `num_rows`; 0 before one was seen."""
        return max(0.0, self._seconds + self.row_s * (num_rows - self._rows))

    def row_share(self, num_rows: int) -> float:
        """All rows' share of the time of a step of `num_rows`; the rest is the same for any number of rows."""
        if self._spread >= _LEAST_SPREAD:
            row_s = self.row_s
            base_s = max(0.0, self._seconds - row_s * self._rows)
        else:
            row_s, base_s = _FIRST_SHARE, 1 - _FIRST_SHARE
        total_s = base_s + row_s * num_rows
        return row_s * num_rows / total_s if total_s > 0 else 1.0
