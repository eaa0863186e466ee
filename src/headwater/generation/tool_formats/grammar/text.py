"""Pieces of llguidance's Lark text that the formats build their grammars of."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headwater.generation.tool_formats.tool_format import Tool
from headwater.grammars.json_schemas import ESCAPES

# as chat templates print JSON, and without room for endless spaces
_LAYOUT = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": ESCAPES,
}


def literal(text: str) -> str:
    """This very text."""
    return json.dumps(text, ensure_ascii=False)


def marker(text: str, special_tokens: Mapping[str, int]) -> str:
    """A marker: the special token of this text if the vocabulary has one, else the text."""
    return f"<[{special_tokens[text]}]>" if text in special_tokens else literal(text)


def json_value(schema: Mapping[str, Any]) -> str:
    """A JSON value that the schema describes, which has been prepared."""
    return "%json " + json.dumps({**schema, "x-guidance": _LAYOUT}, ensure_ascii=False)


def arguments_json(tool: Tool) -> str:
    """The JSON object of a call's arguments."""
    return json_value(tool.parameters)


def rules(named: Mapping[str, str]) -> str:
    return "".join(f"{name}: {body}\n" for name, body in named.items())


def one_of(name: str, tools: Sequence[Tool]) -> str:
    """One of the rules `name_0`, `name_1` and so on, of each tool."""
    return " | ".join(f"{name}_{i}" for i in range(len(tools)))


def repeated(call: str, separator: str, *, parallel: bool) -> str:
    """One call, or if `parallel` several with the separator (a Lark expression, perhaps empty) between them."""
    return f"{call} ({separator} {call})*" if parallel else call


def separated(
    names: Sequence[str], required: Sequence[bool], separator: str, *, prefix: str
) -> tuple[str, dict[str, str]]:
    """Lark text of these rules in this order with the separator between them, and the rules that it needs.

    Those that are not required may lack. The new rules' names begin with `prefix`.
    """
    named: dict[str, str] = {}
    behind = ""  # what may follow once one has been written
    firsts: list[str] = []  # what may be written first; rebuilt from the end
    can_be_empty = True
    for i in reversed(range(len(names))):
        first = f"{names[i]} {behind}".strip()
        firsts = [first] if required[i] else [first, *firsts]
        can_be_empty = can_be_empty and not required[i]
        more = f"{separator} {names[i]}"
        named[f"{prefix}_{i}"] = f"{more if required[i] else f'({more})?'} {behind}".strip()
        behind = f"{prefix}_{i}"
    if not firsts:
        return "", {}
    return f"({' | '.join(firsts)}){'?' if can_be_empty else ''}", named
