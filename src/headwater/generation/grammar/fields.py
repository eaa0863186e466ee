"""Request fields that constrain an answer, and which grammar each asks for."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import Field

from headwater.generation.body import Body
from headwater.generation.errors import InvalidRequest, bad_request
from headwater.grammars.checker import question
from headwater.grammars.errors import GrammarError
from headwater.grammars.json_options import JsonOptions
from headwater.tokenization.json_nesting import MAX_NESTING, is_too_deep

_ONE = "At most one field of a request may constrain the answer."
ANY_JSON = "$$ANY$$"  # SGLang's word for any JSON object


class GrammarFields(Body):
    """SGLang's names, the same on every route."""

    json_schema: dict[str, Any] | bool | str | None = Field(
        default=None, description=f"The answer is JSON that matches this schema (an object, or its text). {_ONE}"
    )
    regex: str | None = Field(default=None, description=f"The whole answer matches this regular expression. {_ONE}")
    ebnf: str | None = Field(
        default=None, description=f"The answer matches this grammar: EBNF with a rule `root` (GBNF), or Lark. {_ONE}"
    )
    structural_tag: dict[str, Any] | str | None = Field(
        default=None, description=f"Free text in which tagged parts have a given form. {_ONE}"
    )


class OpenAIGrammarFields(GrammarFields):
    """OpenAI's and vLLM's names."""

    response_format: dict[str, Any] | None = Field(
        default=None,
        description="`text`; `json_object`, any JSON object; `json_schema`, with `json_schema.schema`, which is always "
        "enforced; or `structural_tag`.",
    )
    guided_json: dict[str, Any] | bool | str | None = Field(default=None, description="The same as json_schema.")
    guided_regex: str | None = Field(default=None, description="The same as regex.")
    guided_grammar: str | None = Field(default=None, description="The same as ebnf.")
    guided_choice: list[str] | None = Field(default=None, description=f"The answer is one of these texts. {_ONE}")
    guided_whitespace_pattern: str | None = Field(
        default=None, description="Regular expression for the whitespace between tokens of JSON."
    )
    structured_outputs: dict[str, Any] | None = Field(
        default=None,
        description="vLLM's form: one of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`, with "
        "`whitespace_pattern`, `disable_any_whitespace`, `disable_additional_properties`.",
    )


class GrammarSource(NamedTuple):
    """One field that asks for a grammar. `asked` is what the checker is asked: equal for equal grammars."""

    param: str
    asked: str


def grammar_source(body: GrammarFields, *, prefix: str = "") -> GrammarSource | None:
    """What a body asks for; None: free text. InvalidRequest if several fields ask, or one is malformed."""
    try:
        sources = list(_sources(body))
    except InvalidRequest as error:
        raise bad_request(f"{prefix}{error.param}", f"{prefix}{error.message}", code=str(error.code)) from None
    if not sources:
        return None
    if len(sources) > 1:
        first, second = (f"{prefix}{source.param}" for source in sources[:2])
        raise bad_request(second, f"{second}: only one of {first} and {second} may be given")
    return sources[0]._replace(param=f"{prefix}{sources[0].param}")


def invalid_grammar(param: str, error: GrammarError) -> InvalidRequest:
    """The 400 for a grammar that cannot be used."""
    return bad_request(param, f"{param}: {error}", code="invalid_grammar")


def _sources(body: GrammarFields) -> Iterator[GrammarSource]:
    options = JsonOptions()
    if isinstance(body, OpenAIGrammarFields):
        if (spacing := body.guided_whitespace_pattern) is not None:
            options = JsonOptions(whitespace=spacing)
        yield from _response_format(body.response_format, options)
        yield from _structured_outputs(body.structured_outputs or {})
        yield from _by_kind("guided_json", "json", body.guided_json, options)
        yield from _by_kind("guided_regex", "regex", body.guided_regex, options)
        yield from _by_kind("guided_grammar", "grammar", body.guided_grammar, options)
        yield from _by_kind("guided_choice", "choice", body.guided_choice, options)
    yield from _by_kind("json_schema", "json", body.json_schema, options)
    yield from _by_kind("regex", "regex", body.regex, options)
    yield from _by_kind("ebnf", "grammar", body.ebnf, options)
    yield from _by_kind("structural_tag", "structural_tag", body.structural_tag, options)


def _by_kind(param: str, kind: str, value: Any, options: JsonOptions) -> Iterator[GrammarSource]:
    """The source for one field; none for null, and for an empty text or list."""
    if value is None or value in ("", []):
        return
    if kind == "json" and value == ANY_JSON:
        kind, value = "json_object", True
    elif kind in ("json", "structural_tag") and isinstance(value, str):
        value = _read_json(param, value)
    yield GrammarSource(param, question(kind, value, options))


def _response_format(given: dict[str, Any] | None, options: JsonOptions) -> Iterator[GrammarSource]:
    if given is None:
        return
    match given.get("type"):
        case "text":
            return
        case "json_object" if given.get("schema") is None:
            yield from _by_kind("response_format", "json_object", True, options)
        case "json_object":  # llama.cpp's form of json_schema
            yield from _by_kind("response_format", "json", given["schema"], options)
        case "json_schema":
            inner = given.get("json_schema")
            schema = inner.get("schema", inner.get("schema_")) if isinstance(inner, dict) else given.get("schema")
            if schema is None or schema == "":
                param = "response_format.json_schema.schema"
                raise bad_request(param, f"{param}: is needed")
            yield from _by_kind("response_format", "json", schema, options)
        case "structural_tag":
            yield from _by_kind("response_format", "structural_tag", given, options)
        case kind:
            accepted = "'text', 'json_object', 'json_schema' or 'structural_tag'"
            raise bad_request("response_format", f"response_format: type must be {accepted}, got {str(kind)[:80]!r}")


_WRITTEN_HOW = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
_HARMLESS = ("disable_fallback", "backend", "_backend", "_backend_was_auto")  # which library, which is always the same


def _structured_outputs(given: dict[str, Any]) -> Iterator[GrammarSource]:
    for name, value in given.items():
        param = f"structured_outputs.{str(name)[:64]}"
        if name not in (*_KINDS, *_WRITTEN_HOW, *_HARMLESS) and value is not None:
            raise bad_request(param, f"{param}: not known; known are {', '.join((*_KINDS, *_WRITTEN_HOW))}")
        if name in _KINDS and value is not None and not isinstance(value, _KINDS[name]):
            raise bad_request(param, f"{param}: has the wrong type")
    whitespace = given.get("whitespace_pattern")
    if whitespace is not None and not isinstance(whitespace, str):
        raise bad_request("structured_outputs.whitespace_pattern", "structured_outputs.whitespace_pattern: not a text")
    if given.get("disable_any_whitespace"):
        whitespace = ""
    closes = bool(given.get("disable_additional_properties"))
    options = JsonOptions(closes_objects=closes)
    if whitespace is not None:
        options = JsonOptions(whitespace=whitespace, closes_objects=closes)
    for name in _KINDS:
        if (value := given.get(name)) is not None and value is not False:
            yield from _by_kind(f"structured_outputs.{name}", name, value, options)


_KINDS: dict[str, tuple[type, ...]] = {
    "json": (dict, str),
    "regex": (str,),
    "choice": (list,),
    "grammar": (str,),
    "json_object": (bool,),
    "structural_tag": (dict, str),
}


def _read_json(param: str, text: str) -> Any:
    """A schema that came as a text."""
    try:
        if is_too_deep(text.encode()):
            raise bad_request(param, f"{param}: must not be nested deeper than {MAX_NESTING} levels")
        return json.loads(text)
    except InvalidRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise bad_request(param, f"{param}: is not valid JSON: {error}", code="invalid_grammar") from None
