"""Arrays of token ids, and the check of all ids at once, beside plain Python."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.generation.token_arrays import first_outside, int32_array

LOWEST, HIGHEST = -(1 << 31), (1 << 31) - 1
IDS = st.lists(st.integers(LOWEST, HIGHEST) | st.integers(-2, 20), max_size=40)


@given(ids=IDS)
def test_an_array_holds_the_numbers_of_the_list(ids: list[int]) -> None:
    assert int32_array(ids) == array("i", ids)


@given(ids=IDS, vocab_size=st.integers(1, 20) | st.integers(1, HIGHEST))
def test_the_first_id_outside_is_that_of_a_search(ids: list[int], vocab_size: int) -> None:
    expected = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    assert first_outside(array("i", ids), vocab_size) == expected
    assert first_outside(ids, vocab_size) == expected


@pytest.mark.parametrize("outside", [-1, LOWEST, 151_936, HIGHEST])
@pytest.mark.parametrize("at", [0, 1, 4_999, 9_999])
def test_one_id_outside_is_found_among_many(at: int, outside: int) -> None:
    """Beside neighbours that are as large as they may be: fields must not carry into each other."""
    ids = array("i", [151_935] * 10_000)
    assert first_outside(ids, 151_936) is None
    ids[at] = outside
    assert first_outside(ids, 151_936) == outside


@pytest.mark.parametrize(
    ("ids", "error"),
    [(["1"], TypeError), ([1, 2.0], TypeError), ([None], TypeError), ((1, 2), TypeError), ("12", TypeError),
     ([1 << 31], OverflowError), ([LOWEST - 1], OverflowError), ([1 << 70], OverflowError)],
)  # fmt: skip
def test_what_is_no_list_of_int32_is_refused(ids: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        int32_array(ids)
