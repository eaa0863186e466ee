"""A page that applies every patch has what the server has."""

import string

from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.http_api.dashboard.differences import difference, patched

LEAVES = (
    st.integers(-3, 3) | st.booleans() | st.floats(0, 1) | st.text(max_size=2) | st.lists(st.integers(0, 2), max_size=2)
)
NAMES = st.sampled_from(string.ascii_lowercase[:4])
VALUES = st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=8)
OBJECTS = st.dictionaries(NAMES, VALUES)


@settings(max_examples=60)
@given(OBJECTS, OBJECTS)
def test_the_patch_makes_the_new_of_the_old(old: dict, new: dict) -> None:
    """Also where a value changes its type: false and 0 are equal in Python and not in JSON."""
    found = patched(old, difference(old, new))
    assert found == new
    assert repr(sorted_by_name(found)) == repr(sorted_by_name(new))


@settings(max_examples=20)
@given(OBJECTS)
def test_nothing_is_sent_if_nothing_changed(facts: dict) -> None:
    assert difference(facts, facts) == {}
    assert difference(facts, patched(facts, {})) == {}


def test_only_what_changed_is_sent() -> None:
    old = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "gone": 1}
    assert difference(old, {"a": {"x": 1, "y": {"z": 3}}, "b": [1, 2]}) == {"a": {"y": {"z": 3}}, "gone": None}


def sorted_by_name(value: object) -> object:
    if isinstance(value, dict):
        return {name: sorted_by_name(value[name]) for name in sorted(value)}
    return value
