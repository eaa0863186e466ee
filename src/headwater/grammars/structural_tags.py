"""Structural tags: free text with parts of a given form, as SGLang and xgrammar describe them, as a Lark grammar.

Two shapes are read: `structures` with `triggers`, and a tree of `format`s. Triggers, begins and ends are text; a token
that spells one of them whole is not used for it. A kind of format that is not in `_FORMATS` is refused.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from headwater.grammars.errors import GrammarError
from headwater.grammars.json_options import JsonOptions
from headwater.grammars.sources import checked_lark, json_schema_rule, literal, regex_rule

Json = dict[str, Any]
MAX_FORMATS = 500
MAX_NESTING = 20
_ANY = "/(?s:.*)/"
_SOME = "/(?s:.+)/"


def from_structural_tag(tag: Any, *, options: JsonOptions = JsonOptions()) -> str:
    """A grammar for a structural tag of either shape. GrammarError names the place in it."""
    if not isinstance(tag, dict):
        raise GrammarError("", "", "a structural tag must be an object")
    writer = _Writer(options)
    if "format" in tag:
        start = writer.format(tag["format"], "format", 0)
    else:
        start = _written_structures(tag, writer)
    return checked_lark("\n".join([f"start: {start}", *writer.lines, ""]))


def _written_structures(tag: Json, writer: "_Writer") -> str:
    """The older shape, written as the tree it stands for. Errors name the places of the older shape."""
    form = _from_structures(tag)
    try:
        return writer.format(form, "", 0)
    except GrammarError as error:
        path = error.path.removeprefix(".").replace("tags[", "structures[", 1)
        raise GrammarError(path.replace(".content.json_schema", ".schema", 1), error.keyword, error.message) from None


def _from_structures(tag: Json) -> Json:
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not all(isinstance(one, dict) for one in structures):
        raise GrammarError("structures", "", "must be a list of objects with begin, schema and end")
    tags = [
        {
            "begin": one.get("begin"),
            "content": {"type": "json_schema", "json_schema": one.get("schema", True)},
            "end": one.get("end"),
        }
        for one in structures
    ]
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


class _Writer:
    """Writes the rules of one grammar. Each method returns an expression for the place where its format stands."""

    def __init__(self, options: JsonOptions) -> None:
        self.lines: list[str] = []
        self._options = options
        self._num_names = 0

    def format(self, form: Any, path: str, depth: int) -> str:
        if not isinstance(form, dict) or (write := _FORMATS.get(str(form.get("type")))) is None:
            kind = form.get("type") if isinstance(form, dict) else form
            raise GrammarError(path, "type", f"must be one of {', '.join(_FORMATS)}, got {str(kind)[:80]!r}")
        if depth > MAX_NESTING or self._num_names > MAX_FORMATS:
            raise GrammarError(path, "", f"at most {MAX_FORMATS} formats in {MAX_NESTING} levels are accepted")
        return write(self, form, path, depth)

    def const_string(self, form: Json, path: str, depth: int) -> str:
        return literal(_text(form, "value", path))

    def json_schema(self, form: Json, path: str, depth: int) -> str:
        if form.get("style", "json") != "json":
            raise GrammarError(path, "style", "must be json")
        try:
            schema = json_schema_rule(form.get("json_schema", True), options=self._options)
        except GrammarError as error:
            raise GrammarError(f"{path}.json_schema{error.path[1:]}", error.keyword, error.message) from None
        return self._rule(f"%json {json.dumps(schema, ensure_ascii=False)}")

    def regex(self, form: Json, path: str, depth: int) -> str:
        return self._terminal(regex_rule(_text(form, "pattern", path)))

    def any_text(self, form: Json, path: str, depth: int) -> str:
        excluded = _texts(form.get("excludes", []), path, "excludes")
        return self._terminal(_without(excluded) if excluded else _ANY)

    def sequence(self, form: Json, path: str, depth: int) -> str:
        elements = _list(form, "elements", path)
        for i, element in enumerate(elements[:-1]):
            if isinstance(element, dict) and element.get("type") in ("any_text", "triggered_tags"):
                raise GrammarError(f"{path}.elements[{i}]", "type", f"{element['type']} must be the last element")
        return self._joined(self._each(elements, f"{path}.elements", depth))

    def either(self, form: Json, path: str, depth: int) -> str:
        options = self._each(_list(form, "elements", path), f"{path}.elements", depth)
        name = self._terminal if all(_is_terminal(option) for option in options) else self._rule
        return name(" | ".join(options))

    def tag(self, form: Json, path: str, depth: int) -> str:
        return self._tag(form, path, depth, num_begun=0)

    def _tag(self, form: Json, path: str, depth: int, *, num_begun: int) -> str:
        """A tag of which the first `num_begun` characters are written already."""
        begin = _text(form, "begin", path, may_be_empty=True)[num_begun:]
        end = form.get("end")
        ends = _texts([end] if isinstance(end, str) else end, path, "end", may_be_empty=True)
        content = form.get("content")
        if isinstance(content, dict) and content.get("type") == "triggered_tags":
            raise GrammarError(f"{path}.content", "type", "triggered_tags must stand outside of tags")
        opening = [literal(begin)] if begin else []
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            excluded = _texts(content.get("excludes", []), path, "excludes")
            return self._joined([*opening, self._terminal(_up_to(ends, without=excluded))])
        closing = self._terminal(" | ".join(literal(text) for text in ends)) if any(ends) else None
        inside = self.format(content, f"{path}.content", depth + 1)
        return self._joined([*opening, inside, *([closing] if closing else [])])

    def triggered_tags(self, form: Json, path: str, depth: int) -> str:
        triggers = _texts(form.get("triggers"), path, "triggers")
        tags = _list(form, "tags", path)
        at_least_one, stops = bool(form.get("at_least_one", False)), bool(form.get("stop_after_first", False))
        excluded = _texts(form.get("excludes", []), path, "excludes")
        groups: dict[str, list[str]] = {}
        whole: list[str] = []
        for i, tag in enumerate(tags):
            place = f"{path}.tags[{i}]"
            begin = _text(_object(tag, place), "begin", place)
            matching = [trigger for trigger in triggers if begin.startswith(trigger)]
            if not matching:
                raise GrammarError(place, "begin", "must start with one of the triggers")
            trigger = min(matching, key=len)  # the one that is complete first
            groups.setdefault(trigger, []).append(self._tag(tag, place, depth + 1, num_begun=len(trigger)))
            if at_least_one:
                whole.append(self._tag(tag, place, depth + 1, num_begun=0))
        unused = [trigger for trigger in triggers if trigger not in groups]
        if unused:
            raise GrammarError(f"{path}.triggers", "", f"no tag begins with {unused[0][:80]!r}")
        tail = self._terminal(_without([*triggers, *excluded]))
        found = self._rule(
            " | ".join(
                f"{self._terminal(_first(trigger, triggers, excluded))} ({' | '.join(tags)})"
                for trigger, tags in groups.items()
            )
        )
        first = f"({' | '.join(whole)})"
        if stops:
            return self._rule(first if at_least_one else f"{found} | {tail}")
        return self._rule(f"{first if at_least_one else ''} {found}* {tail}")

    def tags_with_separator(self, form: Json, path: str, depth: int) -> str:
        tags = _list(form, "tags", path)
        places = [f"{path}.tags[{i}]" for i in range(len(tags))]
        one = self._rule(
            " | ".join(self.tag(_object(tag, place), place, depth + 1) for tag, place in zip(tags, places, strict=True))
        )
        separator = _text(form, "separator", path, may_be_empty=True)
        if bool(form.get("stop_after_first", False)):
            many = one
        else:
            many = f"{one} ({literal(separator)} {one})*" if separator else f"{one}+"
        return self._rule(many if form.get("at_least_one", False) else f"({many})?")

    def _each(self, forms: list[Any], path: str, depth: int) -> list[str]:
        return [self.format(form, f"{path}[{i}]", depth + 1) for i, form in enumerate(forms)]

    def _joined(self, parts: list[str]) -> str:
        """A rule of these parts. Neighbours that are terminals become one, since a terminal takes all it can."""
        words: list[str] = []
        for part in parts:
            if words and _is_terminal(part) and _is_terminal(words[-1]):
                words[-1] = self._terminal(f"{words[-1]} {part}")
            else:
                words.append(part)
        return words[0] if len(words) == 1 else self._rule(" ".join(words))

    def _rule(self, body: str) -> str:
        return self._named("r", body)

    def _terminal(self, body: str) -> str:
        return self._named("T", body)

    def _named(self, letter: str, body: str) -> str:
        self._num_names += 1
        self.lines.append(f"{letter}{self._num_names}: {body}")
        return f"{letter}{self._num_names}"


def _is_terminal(expression: str) -> bool:
    return expression[0] in 'T"'


def _containing(texts: list[str], tail: str = _ANY) -> str:
    return f"({_ANY} ({' | '.join(literal(text) for text in texts)}) {tail})"


def _without(texts: list[str]) -> str:
    """Any text that contains none of some texts."""
    return f"{_ANY} & ~{_containing(texts)}"


def _first(trigger: str, triggers: list[str], excluded: list[str]) -> str:
    """Text up to the end of a trigger, where no trigger ended before."""
    others = f" & ~{_containing(excluded)}" if excluded else ""
    return f"({_ANY} {literal(trigger)}) & ~{_containing(triggers, _SOME)}{others}"


def _up_to(ends: list[str], *, without: list[str]) -> str:
    """Text up to the first of some ends, with that end."""
    others = f" & ~{_containing(without)}" if without else ""
    closing = " | ".join(literal(text) for text in ends)
    return f"({_ANY} ({closing})) & ~{_containing(ends, _SOME)}{others}"


def _object(value: Any, path: str) -> Json:
    if not isinstance(value, dict):
        raise GrammarError(path, "", "must be an object")
    return value


def _list(form: Json, name: str, path: str) -> list[Any]:
    if not isinstance(value := form.get(name), list) or not value:
        raise GrammarError(path, name, "must be a list that is not empty")
    return value


def _text(form: Json, name: str, path: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value := form.get(name), str) or not (value or may_be_empty):
        raise GrammarError(path, name, "must be a text")
    return value


def _texts(value: Any, path: str, name: str, *, may_be_empty: bool = False) -> list[str]:
    is_list = isinstance(value, list) and all(isinstance(item, str) and (item or may_be_empty) for item in value)
    if not is_list or (not value and name != "excludes"):
        raise GrammarError(path, name, "must be a list of texts")
    return value


_FORMATS: Mapping[str, Callable[[_Writer, Json, str, int], str]] = {
    "const_string": _Writer.const_string,
    "json_schema": _Writer.json_schema,
    "regex": _Writer.regex,
    "any_text": _Writer.any_text,
    "sequence": _Writer.sequence,
    "or": _Writer.either,
    "tag": _Writer.tag,
    "triggered_tags": _Writer.triggered_tags,
    "tags_with_separator": _Writer.tags_with_separator,
}
