"""The index of a request's own text finds what a search through all of it finds, and stays small."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headwater.cache.lease import TokenSequence
from headwater.scheduling.speculation.suffixes import GRAM, TokenSuffixes


def sequence(*tokens: int) -> TokenSequence:
    return TokenSequence(np.array(tokens, dtype=np.int32))


def drafted(suffixes: TokenSuffixes, most: int = 8) -> list[int]:
    return suffixes.next_tokens(most)[0].tolist()


def test_a_run_that_occurred_before_goes_on_as_it_did():
    assert drafted(TokenSuffixes(sequence(1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3)), 4) == [4, 5, 6, 7]


def test_text_that_never_occurred_has_no_draft():
    assert drafted(TokenSuffixes(sequence(1, 2, 3, 4, 5, 2, 3, 9, 5, 6))) == []


def test_texts_that_are_too_short_have_no_draft():
    for length in range(1, GRAM + 1):
        assert drafted(TokenSuffixes(sequence(*[7] * length))) == []


def test_the_place_that_agrees_longest_wins_over_the_newest():
    text = [9, 8, 1, 2, 3, 50, 51, 52, 7, 7, 1, 2, 3, 60, 61, 62, 9, 8, 1, 2, 3]
    tokens, num_equal = TokenSuffixes(sequence(*text)).next_tokens(3)
    assert (tokens.tolist(), num_equal) == ([50, 51, 52], 5)


def test_of_places_that_agree_alike_the_newest_wins():
    text = [1, 2, 3, 50, 4, 1, 2, 3, 60, 5, 1, 2, 3]
    assert drafted(TokenSuffixes(sequence(*text)), 1) == [60]


def test_a_period_goes_on_for_as_long_as_asked():
    assert drafted(TokenSuffixes(sequence(1, 2, 3, 1, 2, 3)), 7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafted(TokenSuffixes(sequence(5, 5, 5, 5)), 3) == [5, 5, 5]


def test_tokens_that_come_later_are_found():
    tokens = sequence(1, 2, 3, 4)
    suffixes = TokenSuffixes(tokens)
    assert drafted(suffixes) == []
    for token in (9, 1, 2, 3):
        tokens.append(token)
    assert drafted(suffixes, 2) == [4, 9]


def test_a_long_text_keeps_a_bounded_index():
    """Only the newest tokens are kept: memory does not grow with the answer, and near places are still found."""
    tokens = sequence(*range(100, 120))
    suffixes = TokenSuffixes(tokens, max_tokens=32)
    for number in range(2000):
        tokens.append(number % 20 + 100)
        suffixes.next_tokens(4)
        assert len(suffixes._before) <= 64 and len(suffixes._newest) <= 64
    following = [(1999 + ahead) % 20 + 100 for ahead in range(1, 5)]
    assert drafted(suffixes, 4) == following


def naive(text: list[int], most: int) -> set[int]:
    """The first tokens that may be drafted: after any of the newest places whose match is longest."""
    end = len(text) - 1
    places = [at for at in range(GRAM - 1, end) if text[at - GRAM + 1 : at + 1] == text[end - GRAM + 1 :]][-8:]

    def length(at: int) -> int:
        return next((n for n in range(32) if n > at or text[at - n] != text[end - n]), 32)

    longest = max(map(length, places), default=0)
    return {text[at + 1] for at in places if length(at) == longest}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 60))
def test_it_finds_what_a_search_through_the_text_finds(text: list[int], known: int):
    known = min(known, len(text))
    tokens = sequence(*text[:known])
    suffixes = TokenSuffixes(tokens)
    suffixes.next_tokens(2)
    for token in text[known:]:
        tokens.append(token)
    found = drafted(suffixes, 1)
    assert set(found) <= naive(text, 1) and bool(found) == bool(naive(text, 1))
