"""Grammars of regular expressions, choices, EBNF and Lark: what they accept, and what is refused."""

import pytest
from accepting import Language

from headwater.grammars.errors import GrammarError
from headwater.grammars.sources import MAX_GRAMMAR_CHARS, from_choice, from_ebnf, from_lark, from_regex, json_object

ARITHMETIC = """
# a calculator
root ::= expr
expr ::= term (("+" | "-") term)*   # sums
term ::= "(" expr ")" | number
number ::= [0-9]+ ("." [0-9]{1,2})?
"""


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"\d{3}-\d{4}", ["555-0199"], ["555-019", "5555-0199", "x555-0199", "٣٣٣-٣٣٣٣"]),
        (r"^(yes|no)$", ["yes", "no"], ["yesno", "Yes", ""]),
        (r"[a-z]+@[a-z]+\.(com|org)", ["a@b.com"], ["a@b.net", "a@b,com"]),
        (r"(?i)ok", ["ok", "OK"], ["k"]),
        ("é+/\"'\\\\", ["éé/\"'\\"], ["é/"]),
        (r"a|b|", ["a", "b", ""], ["ab"]),
    ],
)
def test_a_regular_expression_matches_the_whole_text(pattern: str, good: list[str], bad: list[str]) -> None:
    language = Language(from_regex(pattern))
    assert [text for text in good if text not in language] == []
    assert [text for text in bad if text in language] == []


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", r"(?=a)b", r"(a)\1", "[z-a]", "", "a" * 20_000])
def test_a_regular_expression_that_cannot_be_used_is_an_error(pattern: str) -> None:
    with pytest.raises(GrammarError):
        from_regex(pattern)


def test_a_choice_is_one_of_the_texts_and_nothing_else() -> None:
    choices = ["a", "ab", 'say "hi"', "two\nlines", "ünï\\code", "/x/", "<|end|>"]
    language = Language(from_choice(choices))
    assert all(choice in language for choice in choices)
    assert not any(text in language for text in ("", "b", "aab", "two", "say hi", "x"))


@pytest.mark.parametrize("choices", [[], [""], ["a", ""], ["a"] * 20_000, ["\ud800"]])
def test_choices_that_cannot_be_used_are_an_error(choices: list[str]) -> None:
    with pytest.raises(GrammarError):
        from_choice(choices)


def test_ebnf_with_recursion_and_comments() -> None:
    language = Language(from_ebnf(ARITHMETIC))
    assert all(text in language for text in ("1", "1+2", "(1.25-(3))+4", "12.5"))
    assert not any(text in language for text in ("", "+1", "(1", "1.234", "1 + 2"))


@pytest.mark.parametrize(
    ("rules", "good", "bad"),
    [
        ('root ::= "a" | "b" "c"', ["a", "bc"], ["ac", "abc"]),
        (r'root ::= [^"\\\n]* "!"', ["hi!", "!"], ['"!', "hi"]),
        (r"root ::= [a-c\-\]\u00e9]{2}", ["a-", "]é"], ["d-", "a"]),
        ('root ::= "\\u00e9\\x41\\n\\"\\t"', ['éA\n"\t'], ["eA"]),
        ('root ::= . "x"', ["ax", "\nx"], ["x"]),
        ('root ::= word | word " " root\nword ::= [a-z]+', ["ab cd ef", "ab"], ["ab  c", " "]),
        ('root ::= "[" (root ("," root)*)? "]"', ["[]", "[[],[[]]]"], ["[,]", "["]),
        ('root-1 ::= "x"\nroot ::= root-1 root-1', ["xx"], ["x"]),
        ('root ::=\n  "a"\n  | "b"\n', ["a", "b"], ["ab"]),
        ("root ::= [a&&b~-]", ["a", "&", "b", "~", "-"], ["c"]),
        ('root ::= "a"{2,3} | ("b" | "c"){2,}', ["aa", "aaa", "bcb"], ["a", "aaaa", "b"]),
    ],
)
def test_ebnf_means_what_it_says(rules: str, good: list[str], bad: list[str]) -> None:
    language = Language(from_ebnf(rules))
    assert [text for text in good if text not in language] == []
    assert [text for text in bad if text in language] == []


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ('main ::= "a"', "root"),
        ("root ::= missing", "missing"),
        ('root ::= "a\nroot2 ::= "b"', "line 1"),
        ('root ::= "a"\n\nroot ::= "b"', "line 3"),
        ("root ::= ('a')", "line 1"),
        ("root ::= [z-a]", "range"),
        ('root ::= "a" )', "line 1"),
        ("root ::= " + "(" * 100 + '"a"' + ")" * 100, "parentheses"),
        ('root ::= "a"{1,100000}', "range"),
        ('root ::= "\\ud800"', "character"),
        ("", "empty"),
        ("x" * (MAX_GRAMMAR_CHARS + 1), "characters"),
        ("start: nothing", "nothing"),
    ],
)
def test_ebnf_that_cannot_be_used_is_an_error_that_says_where(rules: str, named: str) -> None:
    with pytest.raises(GrammarError) as error:
        from_ebnf(rules)
    assert named in str(error.value)


def test_lark_is_taken_as_it_is_but_without_schemas_in_it() -> None:
    language = Language(from_ebnf('start: "a" B\nB: /[0-9]+/'))
    assert "a12" in language
    assert "a" not in language
    with pytest.raises(GrammarError, match="schema"):
        from_lark('start: %json {"type": "object", "x-guidance": {"lenient": true}, "not": {}}')


def test_any_json_object_and_nothing_but_an_object() -> None:
    language = Language(json_object())
    assert all(text in language for text in ("{}", '{"a": [1, {"b": null}], "c": "\\n"}', '{\n  "a": 1\n}'))
    assert not any(text in language for text in ("[]", "1", "{", '{"a": }', "{} ", " {}", '{"a": 01}'))
    assert '{"a":' + " " * 200 + "1}" not in language  # a model may repeat spaces for ever
