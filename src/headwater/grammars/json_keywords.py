"""The keywords of JSON Schema: those that a grammar enforces, those that say nothing, and those that are refused."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from headwater.grammars.errors import GrammarError

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
STRING_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
MAX_EXACT = 2**53  # the library reads numbers as float64
MAX_LENGTH = 10_000  # of strings: minLength and maxLength
MAX_ITEMS = 2_000  # each allowed item is a rule

ANNOTATIONS = frozenset(
    """$schema $id id $comment $anchor $dynamicAnchor $recursiveAnchor $vocabulary $defs definitions title description
    default examples example deprecated readOnly writeOnly contentEncoding contentMediaType contentSchema
    discriminator externalDocs xml""".split()
)
_NOT_BUILT = "cannot be enforced"
_WHAT_INSTEAD = {
    "not": f"{_NOT_BUILT}; say what is allowed",
    "if": f"{_NOT_BUILT}; use anyOf",
    "contains": f"{_NOT_BUILT}; use prefixItems",
    "propertyNames": f"{_NOT_BUILT}; use patternProperties with additionalProperties false",
    "uniqueItems": f"{_NOT_BUILT}; only false is accepted",
    "nullable": 'is of OpenAPI 3.0; use "type": [..., "null"]',
    "x-guidance": "options of the grammar library are not taken from clients",
    "unevaluatedProperties": f"{_NOT_BUILT} beside applicators; use additionalProperties in each of them",
    "$dynamicRef": f"{_NOT_BUILT}; use $ref",
    "$recursiveRef": f"{_NOT_BUILT}; use $ref",
}
REFUSED: Mapping[str, str] = {
    name: _WHAT_INSTEAD.get(name, _NOT_BUILT)
    for name in """not if then else contains minContains maxContains propertyNames uniqueItems unevaluatedItems
    unevaluatedProperties dependencies dependentRequired dependentSchemas nullable $dynamicRef $recursiveRef
    x-guidance""".split()
}


def is_neutral(keyword: str, value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a keyword that cannot be enforced asks for nothing."""
    match keyword:
        case "uniqueItems" | "nullable":
            return value is False
        case "unevaluatedItems" | "unevaluatedProperties":
            return value is True or value == {}
        case "propertyNames":
            return value is True or value == {} or value == {"type": "string"}
        case "dependencies" | "dependentRequired" | "dependentSchemas":
            return value == {}
        case "then" | "else":
            return "if" not in schema
        case "if":
            return "then" not in schema and "else" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
        case "not":
            return value is False
    return False


def count(value: Any, path: str, keyword: str) -> int:
    """A number of characters, items or properties."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise GrammarError(path, keyword, f"must be a whole number from 0, got {shown(value)}")
    limit = {"Items": MAX_ITEMS, "Length": MAX_LENGTH}.get(keyword[3:], MAX_EXACT)
    if value > limit:
        raise GrammarError(path, keyword, f"must be at most {limit}, got {shown(value)}")
    return value


def number(value: Any, path: str, keyword: str) -> float:
    """A number that float64 holds exactly enough to compare with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GrammarError(path, keyword, f"must be a number, got {shown(value)}")
    if not abs(value) <= (MAX_EXACT if isinstance(value, int) or value.is_integer() else math.inf):
        raise GrammarError(path, keyword, f"whole numbers are compared exactly up to 2**53, got {shown(value)}")
    return value


def multiple_of(value: Any, path: str, keyword: str) -> tuple[int, int]:
    """`(coefficient, exponent)` of the step, which is coefficient / 10**exponent; as the library computes it."""
    step = number(value, path, keyword)
    if step <= 0:
        raise GrammarError(path, keyword, f"must be above 0, got {shown(value)}")
    scaled, exponent = float(step), 0
    while scaled % 1 and exponent < 20:
        scaled, exponent = scaled * 10, exponent + 1
    if not scaled < 2**16 or Decimal(int(scaled)).scaleb(-exponent) != Decimal(repr(step)):
        raise GrammarError(path, keyword, f"must be a decimal number with digits up to {2**16}, got {shown(value)}")
    return int(scaled), exponent


_UNSPELT = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")  # characters of JSON that only \u spells


def check_text(text: str, path: str, keyword: str) -> None:
    """A text that the answer must contain; answers do not use \\u escapes."""
    if (found := _UNSPELT.search(text)) is not None:
        raise GrammarError(path, keyword, f"control characters cannot be generated, found {found[0]!r}")


def check_values(value: Any, path: str, keyword: str) -> None:
    """What `const` and `enum` hold can be generated exactly."""
    if isinstance(value, str):
        check_text(value, path, keyword)
    elif isinstance(value, dict):
        for name, item in value.items():
            check_text(name, path, keyword)
            check_values(item, path, keyword)
    elif isinstance(value, list):
        for item in value:
            check_values(item, path, keyword)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number(value, path, keyword)


_WHOLE_NUMBERS = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32)},
    "int64": (-MAX_EXACT, MAX_EXACT),  # narrower than the format: what float64 counts exactly
    "uint64": (0, MAX_EXACT),
    "uint": (0, MAX_EXACT),
    "int": (-MAX_EXACT, MAX_EXACT),
}


def number_format(name: str) -> tuple[int, int] | None:
    """The range of a format of whole numbers (OpenAPI, schemars); None for another name."""
    return _WHOLE_NUMBERS.get(name)


SAYS_NOTHING_OF_STRINGS = ("password",)
SAYS_NOTHING_OF_NUMBERS = ("float", "double")


def shown(value: Any) -> str:
    """A value for an error text."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


COUNTS = frozenset("minLength maxLength minItems maxItems minProperties maxProperties".split())
