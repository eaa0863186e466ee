"""Grammar texts of the library (llguidance) from what clients send: schemas, regular expressions, EBNF, choices.

Each function validates what it makes, without a tokenizer, and raises `GrammarError`. A grammar that the library would
weaken is an error as well. These functions take milliseconds and, for a text made to be slow, up to a second or two:
call them in a thread. The library leaves Python's lock while it works.
"""

import json
from collections.abc import Sequence
from typing import Any

from headwater.grammars.ebnf import ebnf_to_lark
from headwater.grammars.errors import GrammarError
from headwater.grammars.json_options import JsonOptions
from headwater.grammars.json_schemas import ESCAPES, prepare_schema
from headwater.grammars.library import LLMatcher, LLParserLimits, regex_to_lark

MAX_GRAMMAR_CHARS = 1 << 18
MAX_REGEX_CHARS = 1 << 14
MAX_CHOICES = 10_000


def limits() -> LLParserLimits:
    """What one grammar may cost; the same where grammars are validated and where they are compiled."""
    return LLParserLimits(initial_lexer_fuel=500_000, step_lexer_fuel=200_000, verbose_errors=False)


def from_json_schema(schema: Any, *, options: JsonOptions = JsonOptions()) -> str:
    """A grammar for the JSON texts of a schema's instances."""
    return _checked(_grammar_list({"json_schema": json_schema_rule(schema, options=options)}))


def json_object(*, options: JsonOptions = JsonOptions()) -> str:
    """A grammar for any JSON object."""
    return from_json_schema({"type": "object"}, options=options)


def json_schema_rule(schema: Any, *, options: JsonOptions = JsonOptions()) -> dict[str, Any]:
    """A prepared schema with its options, for `%json` in a Lark grammar. It is not validated yet."""
    spacing = {"whitespace_pattern": options.whitespace} if options.whitespace else {"whitespace_flexible": False}
    prepared = prepare_schema(schema, closes_objects=options.closes_objects)
    return prepared | {"x-guidance": spacing | {"json_allowed_escapes": ESCAPES}}


def from_regex(pattern: str) -> str:
    """A grammar for the texts that match the whole pattern."""
    return _checked(f"start: {regex_rule(pattern)}")


def from_choice(choices: Sequence[str]) -> str:
    """A grammar for exactly one of some texts."""
    if not 0 < len(choices) <= MAX_CHOICES or not all(isinstance(choice, str) and choice for choice in choices):
        raise GrammarError("", "", f"choices must be 1 to {MAX_CHOICES} texts that are not empty")
    return _checked("start: " + " | ".join(literal(choice) for choice in choices))


def from_ebnf(text: str) -> str:
    """A grammar in the EBNF of xgrammar and llama.cpp (GBNF), whose first rule is `root`; or in Lark's form."""
    _check_size(text)
    return from_lark(text) if is_lark(text) else _checked(ebnf_to_lark(text))


def from_lark(text: str) -> str:
    """A grammar in the library's form of Lark, whose first rule is `start`."""
    _check_size(text)
    if "%json" in text:
        raise GrammarError("", "%json", "schemas inside a grammar are not accepted; send the schema by itself")
    return _checked(text)


def regex_rule(pattern: str) -> str:
    """A regular expression as a terminal of a Lark grammar. It is not validated yet."""
    if not 0 < len(pattern) <= MAX_REGEX_CHARS:
        raise GrammarError("", "", f"a regular expression must have 1 to {MAX_REGEX_CHARS} characters")
    _check_unicode(pattern)
    return f"/{regex_to_lark(pattern, 'dw')}/"


def is_lark(text: str) -> bool:
    """Whether a grammar has rules of Lark's form."""
    return "::=" not in text


def literal(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def checked_lark(text: str) -> str:
    """A Lark grammar made here, validated. It may name special tokens, which only a tokenizer could check."""
    return _checked(text, may_name_tokens=True)


def _grammar_list(*grammars: dict[str, Any]) -> str:
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _check_size(text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise GrammarError("", "", "a grammar must be a text that is not empty")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError("", "", f"a grammar must have at most {MAX_GRAMMAR_CHARS} characters, got {len(text)}")


def _checked(text: str, *, may_name_tokens: bool = False) -> str:
    """The text, if the library takes it as it is. A warning of the library is an error."""
    _check_size(text)
    _check_unicode(text)
    _, problems = LLMatcher.validate_grammar_with_warnings(text, limits=limits())
    if may_name_tokens:
        problems = [problem for problem in problems if not problem.startswith("no tokenizer")]
    if problems:
        raise GrammarError("", "", _first_line(problems[0]))
    return text


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError("", "", f"is not valid Unicode: a lone surrogate at character {error.start}") from None


def _first_line(problem: str) -> str:
    return problem.strip().partition("\n")[0][:500]
