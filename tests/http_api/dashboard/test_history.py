"""What a page gets to look back on when it is opened."""

from itertools import accumulate, pairwise

from headwater.http_api.dashboard.history import DENSE_SAMPLES, THIN_SAMPLES, History


def values(history: History) -> dict[str, list[int]]:
    return {name: list(accumulate(steps)) for name, steps in history.columns().items()}


def test_the_newest_samples_are_kept_all_and_older_ones_every_ten_seconds() -> None:
    history = History()
    for second in range(5000):
        history.add({"t": 1000 * second, "tokens": 7 * second})
    found = values(history)
    assert found["t"][-DENSE_SAMPLES:] == [1000 * second for second in range(5000 - DENSE_SAMPLES, 5000)]
    thin = found["t"][:-DENSE_SAMPLES]
    assert len(thin) == THIN_SAMPLES
    assert {after - before for before, after in pairwise(thin)} == {10_000}
    assert found["tokens"] == [7 * t // 1000 for t in found["t"]]


def test_a_series_that_began_later_has_no_values_before() -> None:
    history = History()
    history.add({"t": 0})
    history.add({"t": 1000, "host.tree": 5})
    assert values(history) == {"t": [0, 1000], "host.tree": [-1, 5]}
