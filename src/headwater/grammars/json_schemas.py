"""JSON schemas in the form that the grammar library enforces exactly. What it would ignore or approximate is refused.

The result is JSON Schema 2020-12 whose only references are `#/$defs/N`, without annotations. docs/structured-output.md
lists what is decided here and what is refused.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from headwater.grammars.disjoint import Disjointness
from headwater.grammars.errors import GrammarError
from headwater.grammars.json_keywords import (
    ANNOTATIONS,
    COUNTS,
    REFUSED,
    SAYS_NOTHING_OF_NUMBERS,
    SAYS_NOTHING_OF_STRINGS,
    STRING_FORMATS,
    TYPES,
    check_text,
    check_values,
    count,
    is_neutral,
    multiple_of,
    number,
    number_format,
    shown,
)

# without \\u: "\\u0061" would be another spelling of a name that is listed, and escape the schema of its value
ESCAPES = 'nrbtf\\"'
Json = dict[str, Any]
MAX_NESTING = 100
MAX_SCHEMAS = 10_000  # schemas in one document, after each reference has been followed once
MAX_PATTERNS = 32  # patternProperties of one object, which are compared with each other
_IN_PLACE = ("allOf", "anyOf", "oneOf")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_ROOT = "#"
_ADDRESS = "references in or into a schema with an $id of its own are not followed"


def prepare_schema(schema: Any, *, closes_objects: bool = False) -> Json:
    """The schema as the library takes it. Raises GrammarError that names path and keyword.

    `closes_objects`: objects that list `properties` allow no others unless they say so.
    """
    return _Document(schema, closes_objects=closes_objects).prepared()


class _Document:
    """One schema while it is read, with the targets of its references."""

    def __init__(self, root: Any, *, closes_objects: bool) -> None:
        self._root = root
        self._closes_objects = closes_objects
        self._names: dict[str, str] = {}  # reference as given -> name in the result
        self._definitions: Json = {}
        self._one_ofs: list[tuple[str, Json]] = []
        self._steps: set[tuple[int, int]] = set()  # of all multipleOf
        self._bounds: set[tuple[str, float]] = set()  # of all numbers
        self._combines = False  # whether bounds of several schemas may hold for one number
        self._num_schemas = 0

    def prepared(self) -> Json:
        result = self.read(self._root, _ROOT)
        if result is False:
            raise GrammarError(_ROOT, "", "false matches nothing")
        done = 0
        while done < len(self._names):
            reference = list(self._names)[done]
            self._definitions[self._names[reference]] = self.read(self._target(reference), reference)
            done += 1
        self._check_steps()
        if self._combines:
            _check_zero(self._bounds, _ROOT)
        self._check_recursion(result)
        self._resolve_one_ofs()
        definitions = {name.rpartition("/")[2]: schema for name, schema in self._definitions.items()}
        return ({} if result is True else result) | ({"$defs": definitions} if definitions else {})

    # --- one schema --------------------------------------------------------------------------------

    def read(self, schema: Any, path: str) -> Any:
        """A schema at `path`, prepared."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise GrammarError(path, "", f"a schema must be an object, true or false, got {shown(schema)}")
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS or path.count("/") > MAX_NESTING:
            raise GrammarError(path, "", f"at most {MAX_SCHEMAS} schemas nested in {MAX_NESTING} levels are accepted")
        if path != _ROOT and _has_address(schema) and '"$ref": ' in json.dumps(schema):
            raise GrammarError(path, "$id", _ADDRESS)
        result: Json = {}
        for keyword, value in schema.items():
            if keyword in result or keyword in ANNOTATIONS:
                continue
            if (read := _READERS.get(keyword)) is not None:
                result.update(read(self, value, path, schema))
            else:
                _check_unread(keyword, value, path, schema)
        self._finish(schema, result, path)
        return result

    def _finish(self, schema: Json, result: Json, path: str) -> None:
        """Keywords that follow from several others."""
        if "oneOf" in result:
            self._one_ofs.append((path, result))
        is_object = "properties" in result or "patternProperties" in result
        if self._closes_objects and is_object and "additionalProperties" not in result:
            result["additionalProperties"] = False
        bounds = [(name, result[name]) for name in _BOUNDS if name in result]
        self._bounds.update(bounds)
        self._combines |= "allOf" in result or bool(bounds and any(name in result for name in (*_IN_PLACE, "$ref")))
        _check_zero(bounds, path)
        least, required = result.get("minProperties", 0), len(result.get("required", ()))
        if least > required + 1:  # names that are not listed may repeat, and a reader keeps one of them
            raise GrammarError(path, "minProperties", f"at most one more than the required properties, got {least}")

    def schemas(self, value: Any, path: str, schema: Json, keyword: str) -> Json:
        """A keyword whose value is a list of schemas."""
        if not isinstance(value, list) or not value:
            raise GrammarError(path, keyword, f"must be a list of schemas, got {shown(value)}")
        return {keyword: [self.read(item, f"{path}/{keyword}/{i}") for i, item in enumerate(value)]}

    def one(self, value: Any, path: str, schema: Json, keyword: str) -> Json:
        """A keyword whose value is a schema."""
        return {keyword: self.read(value, f"{path}/{keyword}")}

    def properties(self, value: Any, path: str, schema: Json, keyword: str) -> Json:
        """A keyword whose value maps names to schemas."""
        if not isinstance(value, dict):
            raise GrammarError(path, keyword, f"must be an object, got {shown(value)}")
        if keyword == "properties":
            check_text("".join(value), path, keyword)
        return {keyword: {name: self.read(item, f"{path}/{keyword}/{_escaped(name)}") for name, item in value.items()}}

    def open_properties(self, value: Any, path: str, schema: Json, keyword: str) -> Json:
        """`patternProperties` and `additionalProperties`, side by side: the library reads them together."""
        result: Json = {}
        if (patterns := schema.get("patternProperties")) is not None:
            if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
                raise GrammarError(path, "patternProperties", f"at most {MAX_PATTERNS} patterns, got {len(patterns)}")
            result |= self.properties(patterns, path, schema, "patternProperties")
        if "additionalProperties" in schema:
            result |= self.one(schema["additionalProperties"], path, schema, "additionalProperties")
        return result

    def unevaluated(self, value: Any, path: str, schema: Json, keyword: str) -> Json:
        """`unevaluatedProperties`: without applicators beside it, it says what `additionalProperties` says."""
        if is_neutral(keyword, value, schema) or "additionalProperties" in schema:
            return {}
        if any(name in schema for name in (*_IN_PLACE, "$ref")):
            raise GrammarError(path, keyword, REFUSED[keyword])
        return self.open_properties(value, path, schema | {"additionalProperties": value}, keyword)

    def items(self, value: Any, path: str, schema: Json, keyword: str) -> Json:
        """`items` and `additionalItems`; the list form of older drafts is `prefixItems` today."""
        if not isinstance(value, list):
            return self.one(value, path, schema, "items")
        if "prefixItems" in schema:
            raise GrammarError(path, "items", "must be a schema beside prefixItems, got a list")
        listed = [self.read(item, f"{path}/items/{i}") for i, item in enumerate(value)]
        rest = self.read(schema.get("additionalItems", True), f"{path}/additionalItems")
        return {"prefixItems": listed, "items": rest}

    def reference(self, value: Any, path: str, schema: Json, keyword: str) -> Json:
        """`$ref` to a place in the same document."""
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise GrammarError(path, keyword, f"must point into this schema (#/...), got {shown(value)}")
        self._target(value, path)
        return {"$ref": self._names.setdefault(value, f"#/$defs/{len(self._names)}")}

    def step(self, value: Any, path: str, schema: Json, keyword: str) -> Json:
        self._steps.add(multiple_of(value, path, keyword))
        return {keyword: value}

    # --- the whole document ------------------------------------------------------------------------

    def _target(self, reference: str, path: str = "") -> Any:
        place: Any = self._root
        for depth, part in enumerate(unquote(reference[2:]).split("/") if len(reference) > 1 else ()):
            if depth and _has_address(place):
                raise GrammarError(path, "$ref", _ADDRESS)
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(place, dict) and name in place:
                place = place[name]
            elif isinstance(place, list) and name.isdecimal() and int(name) < len(place):
                place = place[int(name)]
            else:
                raise GrammarError(path, "$ref", f"nothing is at {shown(reference)}")
        return place

    def _check_steps(self) -> None:
        """The library intersects steps in 32 bits."""
        longest = max((exponent for _, exponent in self._steps), default=0)
        if math.lcm(*(step * 10 ** (longest - exponent) for step, exponent in self._steps)) >= 2**16:
            raise GrammarError(_ROOT, "multipleOf", "too many different steps in one schema")

    def _check_recursion(self, root: Any) -> None:
        """References must not lead back to themselves without passing a property or an item."""
        schemas = {_ROOT: root} | self._definitions
        state: dict[str, bool] = {}  # False while it is followed

        def follow(name: str) -> None:
            if state.setdefault(name, False):
                return
            for reference in _references_in_place(schemas[name]):
                if state.get(reference) is False:
                    given = next(given for given, new in self._names.items() if new == reference)
                    raise GrammarError(given, "$ref", "leads back to itself without a property or an item between")
                follow(reference)
            state[name] = True

        follow(_ROOT)
        for name in self._definitions:
            follow(name)

    def _resolve_one_ofs(self) -> None:
        """Say `anyOf` where the alternatives exclude each other."""
        disjointness = Disjointness(self._definitions)
        for path, schema in self._one_ofs:
            options = schema["oneOf"]
            for i, option in enumerate(options):
                for j in range(i):
                    if not disjointness.are(options[j], option):
                        message = f"alternatives {j} and {i} may both match; use anyOf, or a const that differs"
                        raise GrammarError(path, "oneOf", message)
            _replace_one_of(schema, options)


def _check_zero(bounds: Iterable[tuple[str, float]], path: str) -> None:
    """The library lets 0 pass where 0 is excluded and the other bound is a fraction (0 < x < 0.5)."""
    excluded = [name for name, value in bounds if value == 0 and name.startswith("exclusive")]
    if excluded and any(0 < abs(value) < 1 for _, value in bounds):
        raise GrammarError(path, excluded[0], "0 cannot be excluded beside a bound between -1 and 1")


def _has_address(schema: Any) -> bool:
    return isinstance(schema, dict) and not str(schema.get("$id", "#")).startswith("#")


def _replace_one_of(schema: Json, options: list[Any]) -> None:
    items = list(schema.items())  # the order of keywords is that of properties
    has_other = "anyOf" in schema
    schema.clear()
    for keyword, value in items:
        if keyword != "oneOf":
            schema[keyword] = value
        elif not has_other:
            schema["anyOf"] = options
    if has_other:
        schema["allOf"] = [*schema.get("allOf", ()), {"anyOf": options}]


def _references_in_place(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"]
        for keyword in _IN_PLACE:
            for option in schema.get(keyword, ()):
                yield from _references_in_place(option)


def _check_unread(keyword: str, value: Any, path: str, schema: Json) -> None:
    """A keyword that no grammar enforces: neutral, refused, misspelt, or an annotation of the client's own."""
    if keyword in REFUSED:
        if is_neutral(keyword, value, schema):
            return
        raise GrammarError(path, keyword, REFUSED[keyword])
    if keyword.startswith(("x-", "_")):
        return
    known = [*_READERS, *REFUSED]
    if meant := difflib.get_close_matches(keyword[:64], known, n=1, cutoff=0.85):
        raise GrammarError(path, keyword[:64], f"is not a keyword; did you mean {meant[0]}?")


# --- keywords with plain values ------------------------------------------------------------------------


def _type(document: _Document, value: Any, path: str, schema: Json) -> Json:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or any(name not in TYPES for name in names):
        raise GrammarError(path, "type", f"must be one of {', '.join(TYPES)}, or a list of them, got {shown(value)}")
    return {"type": value}


def _values(document: _Document, value: Any, path: str, schema: Json, keyword: str) -> Json:
    if keyword == "enum" and (not isinstance(value, list) or not value):
        raise GrammarError(path, keyword, f"must be a list of values, got {shown(value)}")
    check_values(value, path, keyword)
    return {keyword: value}


def _required(document: _Document, value: Any, path: str, schema: Json) -> Json:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise GrammarError(path, "required", f"must be a list of names, got {shown(value)}")
    check_text("".join(value), path, "required")
    return {"required": list(dict.fromkeys(value))}


def _pattern(document: _Document, value: Any, path: str, schema: Json) -> Json:
    if not isinstance(value, str):
        raise GrammarError(path, "pattern", f"must be a regular expression, got {shown(value)}")
    return {"pattern": value}


def _bound(document: _Document, value: Any, path: str, schema: Json, keyword: str) -> Json:
    return {keyword: number(value, path, keyword)}


def _exclusive(document: _Document, value: Any, path: str, schema: Json, keyword: str) -> Json:
    """Exclusive bounds; draft 4 has true beside `minimum`."""
    if isinstance(value, bool):
        inclusive = "minimum" if keyword == "exclusiveMinimum" else "maximum"
        if not value or inclusive not in schema:
            return {}
        value = schema[inclusive]
    return {keyword: number(value, path, keyword)}


def _format(document: _Document, value: Any, path: str, schema: Json) -> Json:
    types = schema.get("type", "string")
    is_number = types in ("integer", "number")
    if is_number and isinstance(value, str) and (limits := number_format(value)) is not None:
        least = number(schema.get("minimum", limits[0]), path, "minimum")
        most = number(schema.get("maximum", limits[1]), path, "maximum")
        return {"minimum": max(least, limits[0]), "maximum": min(most, limits[1])}
    if value in (SAYS_NOTHING_OF_NUMBERS if is_number else SAYS_NOTHING_OF_STRINGS):
        return {}
    if value not in STRING_FORMATS:
        accepted = ", ".join((*STRING_FORMATS, *SAYS_NOTHING_OF_STRINGS))
        raise GrammarError(path, "format", f"{shown(value)} cannot be enforced; accepted: {accepted}")
    return {"format": value}


def _count(document: _Document, value: Any, path: str, schema: Json, keyword: str) -> Json:
    return {keyword: count(value, path, keyword)}


def _additional_items(document: _Document, value: Any, path: str, schema: Json) -> Json:
    return {}  # read with `items`; without a list there, it says nothing


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


_Reader = Callable[[_Document, Any, str, Json], Json]


def _naming(read: Callable[..., Json], keyword: str) -> _Reader:
    return lambda document, value, path, schema: read(document, value, path, schema, keyword)


_READERS: Mapping[str, _Reader] = {
    "type": _type,
    "required": _required,
    "pattern": _pattern,
    "format": _format,
    "additionalItems": _additional_items,
    **{name: _naming(_values, name) for name in ("const", "enum")},
    **{name: _naming(_bound, name) for name in ("minimum", "maximum")},
    **{name: _naming(_exclusive, name) for name in ("exclusiveMinimum", "exclusiveMaximum")},
    **{name: _naming(_count, name) for name in COUNTS},
    **{name: _naming(_Document.schemas, name) for name in (*_IN_PLACE, "prefixItems")},
    **{name: _naming(_Document.open_properties, name) for name in ("patternProperties", "additionalProperties")},
    "properties": _naming(_Document.properties, "properties"),
    "items": _naming(_Document.items, "items"),
    "unevaluatedProperties": _naming(_Document.unevaluated, "unevaluatedProperties"),
    "multipleOf": _naming(_Document.step, "multipleOf"),
    "$ref": _naming(_Document.reference, "$ref"),
}
