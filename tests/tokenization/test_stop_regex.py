"""Stop patterns, compared with Python's `re` on every beginning of the text."""

import contextlib
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headwater.tokenization.stop_program import MAX_STATES, compile_stop
from headwater.tokenization.stop_regex import StopRegexMatcher

PATTERNS = [
    r"ab+c",
    r"a.*b",
    r"(?:a|bc)\s",
    r"[^ab\n]{2,3}",
    r"^ab",
    r"(?m)^b",
    r"\d{2}|ab?c",
    r"(?i)AB|\W\w",
    r"(a|aa){3}",
    r"[.!?]\s*$",
    r"(?s)a.c",
    r"a(?:b|c)*?d",
    r"(?a:\w)\d",
    r"(a*)*b",
    r"a{2,}b",
    r"[A-C]a|é\S",
    r"a{,2}c|b{1,2}?d|x{}",
    r"[]b-d-]a|[^]a-c]b",
    r"(?P<first>a|b)(?#a note)c",
    r"(?x) a \ b | [ b] c",
    r"(?i:a)B|(?-i:b)C",
    r"\x61\142|\u0063\N{DIGIT ONE}|\.\n",
    r"(?s:a.)c|[\d.]{2}|[^\w\s]$",
]


def reference(text: str, patterns: list[str]) -> tuple[str, str | None]:
    """The text before the match whose last character comes first, and the pattern; the longest of those."""
    for end in range(1, len(text) + 1):
        found = [(m.start(), p) for p in patterns for m in matches_that_end(p, text, end)]
        if found:
            start = min(found)[0]
            return text[:start], next(p for p in patterns if any(s == start and q == p for s, q in found))
    return text, None


def matches_that_end(pattern: str, text: str, end: int):
    flags, body = re.fullmatch(r"(\(\?\w+\))?(.*)", pattern, re.DOTALL).groups()
    compiled = re.compile(f"{flags or ''}(?:{body})\\Z")
    for start in range(end):
        is_beginning = start == 0 or not body.startswith("^") or (flags == "(?m)" and text[start - 1] == "\n")
        if is_beginning and (match := compiled.match(text[:end], start)) is not None:
            yield match
            return


def run(text: str, patterns: list[str], *, chunk: int = 1, include_stop: bool = False) -> tuple[str, str | None]:
    matcher = StopRegexMatcher(compile_stop((), tuple(patterns)), include_stop=include_stop)
    passed = "".join(matcher.feed(text[at : at + chunk]) for at in range(0, len(text), chunk))
    return passed + matcher.finish(), matcher.matched


@given(
    text=st.text(alphabet="aabbcdABC é1 2.\n", max_size=24),
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3, unique=True),
    chunk=st.integers(1, 9),
)
@example(text="1b\nb", patterns=[r"(?m)^b"], chunk=1)  # a character that begins nothing, but for the next line
def test_the_match_is_the_first_one_of_re_however_the_text_is_cut(text, patterns, chunk):
    assert run(text, patterns, chunk=chunk) == reference(text, patterns)


def test_of_patterns_with_the_same_match_the_first_one_is_reported():
    for patterns in (["(?m)^b", "(a*)*b"], ["(a*)*b", "(?m)^b"]):
        assert run("b", patterns) == ("", patterns[0])


def test_text_that_may_begin_a_match_is_held_back_and_no_more():
    matcher = StopRegexMatcher(compile_stop((), ("a[0-9]+b",)))
    assert [matcher.feed(piece) for piece in ("xxa", "12", "c", "ya", "1b", "z")] == ["xx", "", "a12c", "y", "", ""]
    assert matcher.matched == "a[0-9]+b"


def test_the_match_can_be_kept():
    assert run("one a12b two", [r"a\d+b"], include_stop=True, chunk=3) == ("one a12b", r"a\d+b")


def test_stop_strings_beside_patterns_count_by_their_last_character():
    for stop, regex, expected in (("bcd", "bc", "bc"), ("bc", "bcd", "bc"), ("abc", "c", "abc")):
        matcher = StopRegexMatcher(compile_stop((stop,), (regex,)))
        matcher.feed("xabcd")
        assert matcher.matched == expected


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "not a regular expression"),
        ("a*", "empty text"),
        ("^", "empty text"),
        ("(?=a)b", "assert"),
        (r"(a)\1", "groupref"),
        (r"a\b", "next character"),
        ("a$b", "only at its end"),
        ("a++b", "possessive"),
        ("(?>a)b", "atomic_group"),
        ("(a)(?(1)b|c)", "groupref_exists"),
        ("(?P<n>a)(?P=n)", "groupref"),
        ("(?<!a)b", "assert"),
        (r"a\B", "next character"),
        ("a{100}|b{100}", "more than 200 states"),
        ("(" * 3000 + "a" + ")" * 3000, "nested|regular expression"),
        ("a{1,99999999999999}", "states|regular expression"),
    ],
)
def test_what_cannot_be_searched_for_is_refused_with_the_reason(pattern, reason):
    with pytest.raises(ValueError, match=reason):
        compile_stop((), (pattern,))


def test_repeats_of_nothing_take_no_time():
    """A billion rounds that add no state kept the process busy for minutes."""
    for pattern in ("(?:){1000000000}a", "(?:(?:){9999}|(?:)){1000000000}a", "(?:(?#x)){7,1000000000}a"):
        with contextlib.suppress(ValueError):  # optional rounds are states, and too many
            assert run("bab", [pattern]) == ("b", pattern)


def test_patterns_that_make_backtracking_explode_cost_no_more_than_their_states():
    """With `re`, the first of these takes hours. The bound is a hundred times what it took when this was written."""
    began_s = time.process_time()
    for pattern in (r"(a+)+b", r"(a|a)*c", r"(a?){90}c", r".*.*.*=x"):
        assert run("a" * 2000, [pattern], chunk=7) == ("a" * 2000, None)
    assert time.process_time() - began_s < 100
    assert len(compile_stop((), (r"(a?){90}c",)).states) < MAX_STATES
