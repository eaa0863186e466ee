"""Log-probabilities and the largest logits, by their definitions."""

import numpy as np
import pytest

from headwater.execution.logprobs import largest, token_logprobs
from headwater.messages.generation import LogprobParams


@pytest.mark.parametrize("size", [1, 7, 600, 5000, 50_001])
@pytest.mark.parametrize("num", [0, 1, 5, 300, 4096])
def test_the_largest_come_in_order(size: int, num: int) -> None:
    num = min(num, size)
    row = np.random.default_rng(size).standard_normal(size, dtype=np.float32)
    row[size // 2 :] = np.round(row[size // 2 :], 1)  # some are alike
    expected = sorted(range(size), key=lambda at: (-row[at], at))[:num]
    assert largest(row, num).tolist() == expected


def test_largest_of_rows_that_end_in_them_or_hold_nothing_else() -> None:
    """What lies behind the last whole column, and rows of one value."""
    row = np.zeros(5003, dtype=np.float32)
    row[-2:] = [1.0, 2.0]
    assert largest(row, 3).tolist() == [5002, 5001, 0]
    assert largest(np.full(5003, -np.inf, dtype=np.float32), 3).tolist() == [0, 1, 2]
    assert len(largest(np.full(5003, np.nan, dtype=np.float32), 3)) == 3


def test_logprobs_are_logits_less_the_log_of_the_sum() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 4000), dtype=np.float32) * 30
    logits[2] += 1000  # exp of which is infinite
    before = logits.copy()
    wide = logits.astype(np.float64)
    expected = wide - wide.max(axis=-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(axis=-1, keepdims=True))
    params = [LogprobParams(top=2), LogprobParams(top=0, token_ids=(7, 0)), LogprobParams(top=4, token_ids=(9,))]
    found = token_logprobs(logits, [5, 6, 7], params)
    assert np.array_equal(logits, before)
    for row, (answer, param) in enumerate(zip(found, params, strict=True)):
        order = np.argsort(-wide[row])[: param.top]
        assert answer.token_id == 5 + row
        assert answer.top_ids == tuple(order.tolist())
        of_ids = (answer.logprob, *answer.top_logprobs, *answer.ids_logprobs)
        assert of_ids == pytest.approx(expected[row, [5 + row, *order, *param.token_ids]], abs=2e-4)
