"""Stop strings are found wherever the borders of the pieces fall, and nothing of them leaks out before."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.tokenization.stop_strings import StopStringMatcher

# Few letters, so that overlaps and near misses are common.
TEXT = st.text(alphabet="ab\n", max_size=30)
STOP = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, stop: list[str]) -> tuple[int, str] | None:
    """By definition: the smallest end, then the longest string. End and string."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return end, max(ending, key=len)
    return None


def run(stop: list[str], pieces: list[str], **options) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stop, **options)
    text = "".join(matcher.feed(piece) for piece in pieces)
    return text + matcher.finish(), matcher.matched


@given(text=TEXT, stop=STOP, cuts=st.lists(st.integers(0, 30), max_size=6), include_stop=st.booleans())
def test_the_match_is_the_first_to_complete_however_the_text_is_cut(text, stop, cuts, include_stop):
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    found = first_match(text, stop)
    if found is None:
        expected = (text, None)
    else:
        end, string = found
        expected = (text[: end if include_stop else end - len(string)], string)
    assert run(stop, pieces, include_stop=include_stop) == expected


@given(text=TEXT, stop=STOP)
def test_what_is_given_out_is_never_the_beginning_of_a_stop_string(text, stop):
    """Text shown to a client cannot be taken back when the stop string is complete."""
    matcher = StopStringMatcher(stop)
    shown = ""
    for position, char in enumerate(text):
        shown += matcher.feed(char)
        if matcher.matched is not None:
            return
        held = text[len(shown) : position + 1]
        assert shown + held == text[: position + 1]
        assert held == "" or any(string.startswith(held) for string in stop)  # no more is held than needed
        assert not any(
            string.startswith(text[start : position + 1])
            for string in stop
            for start in range(len(shown))
        )


def test_nothing_comes_after_a_match():
    matcher = StopStringMatcher(["STOP"])
    assert matcher.feed("one ST") == "one "
    assert matcher.feed("OP two") == ""
    assert matcher.matched == "STOP"
    assert matcher.feed("three") == ""
    assert matcher.finish() == ""


def test_the_beginning_of_a_stop_string_is_given_out_at_the_end():
    matcher = StopStringMatcher(["\n\nUser:"])
    assert matcher.feed("bye\n\nUs") == "bye"
    assert matcher.finish() == "\n\nUs"


def test_a_mismatch_falls_back_to_a_shorter_beginning_and_not_to_none():
    """`aab` in `aaab`: giving up after the second `a` would miss it."""
    assert run(["aab"], list("xaaab")) == ("xa", "aab")


def test_a_stop_string_within_another_is_found_first():
    assert run(["abcde", "bc"], list("abcdef")) == ("a", "bc")


def test_of_two_that_end_together_the_longer_is_cut_off():
    assert run(["b", "ab"], ["xab"]) == ("x", "ab")


def test_many_stop_strings_cost_no_more_per_character():
    """Thousands of strings, all beginning alike: one state each character, so this ends at once."""
    stop = [f"{'a' * 50}{number}" for number in range(2000)]
    text, matched = run(stop, ["a" * 50_000, "1999"])
    assert (len(text), matched) == (50_000 - 50, "a" * 50 + "1")


def test_an_empty_stop_string_is_refused():
    """It would match before the first token."""
    with pytest.raises(ValueError, match="stop: a stop string must not be empty"):
        StopStringMatcher(["x", ""])
