"""EBNF as xgrammar and llama.cpp (GBNF) write it, translated to the library's form of Lark.

What is regular becomes a terminal, one for each longest run, because the library's parser is fast and exact on those.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from headwater.grammars.errors import GrammarError

MAX_PARENTHESES = 60
MAX_REPEATS = 10_000
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
    |(?P<define>::=)
    |(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)
    |(?P<text>"(?:[^"\\\n]|\\.)*")
    |(?P<set>\[(?:[^\]\\\n]|\\.)*\])
    |(?P<repeat>[*+?]|\{\s*\d{1,9}\s*(?:,\s*(?:\d{1,9})?\s*)?\})
    |(?P<mark>[().|])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|([^\\])", re.DOTALL)
_SHORT = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


@dataclass(slots=True)
class _Node:
    """A part of a rule. `text` is a literal or a set of characters as a regular expression, or a rule's name."""

    kind: str  # text, set, name, sequence, choice, repeat
    text: str = ""
    parts: list["_Node"] = field(default_factory=list)


def ebnf_to_lark(text: str) -> str:
    """The grammar in Lark. Raises GrammarError with the line; the result is not validated."""
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise GrammarError("", "root", "the grammar has no rule root")
    return _Writer(rules).lark()


def _fail(line: int, message: str) -> GrammarError:
    return GrammarError("", f"line {line}", message)


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0
        self._depth = 0

    def rules(self) -> dict[str, _Node]:
        rules: dict[str, _Node] = {}
        lines: dict[str, int] = {}
        while self._kind() != "end":
            name = self._take("name", "a rule's name")
            self._take("define", "::=")
            if name.text in rules:
                raise _fail(name.line, f"rule {name.text} is defined twice")
            rules[name.text] = self._choice()
        for token in self._tokens:
            if token.kind == "name":
                lines.setdefault(token.text, token.line)
        for name, line in lines.items():
            if name not in rules:
                raise _fail(line, f"rule {name} is not defined")
        return rules

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._is("mark", "|"):
            self._at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Node("choice", parts=options)

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while (part := self._part()) is not None:
            while self._kind() == "repeat":
                part = _Node("repeat", _bounds(self._tokens[self._at]), [part])
                self._at += 1
            parts.append(part)
        return parts[0] if len(parts) == 1 else _Node("sequence", parts=parts)

    def _part(self) -> _Node | None:
        token = self._tokens[self._at]
        if token.kind == "name" and self._tokens[self._at + 1].kind != "define":
            node = _Node("name", token.text)
        elif token.kind == "text":
            node = _Node("text", "".join(_characters(token, token.text[1:-1])))
        elif token.kind == "set":
            node = _Node("set", _set(token))
        elif token.text == "." and token.kind == "mark":
            node = _Node("set", "(?s:.)")
        elif token.text == "(" and token.kind == "mark":
            return self._group(token)
        else:
            return None
        self._at += 1
        return node

    def _group(self, token: _Token) -> _Node:
        self._depth += 1
        if self._depth > MAX_PARENTHESES:
            raise _fail(token.line, f"at most {MAX_PARENTHESES} parentheses inside each other are accepted")
        self._at += 1
        inside = self._choice()
        if not self._is("mark", ")"):
            raise _fail(self._tokens[self._at].line, f"expected ), got {self._tokens[self._at].text!r}")
        self._at += 1
        self._depth -= 1
        return inside

    def _kind(self) -> str:
        return self._tokens[self._at].kind

    def _is(self, kind: str, text: str) -> bool:
        return self._tokens[self._at].kind == kind and self._tokens[self._at].text == text

    def _take(self, kind: str, what: str) -> _Token:
        token = self._tokens[self._at]
        if token.kind != kind:
            raise _fail(token.line, f"expected {what}, got {token.text!r}")
        self._at += 1
        return token


def _tokens(text: str) -> Iterator[_Token]:
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _fail(line, f"not understood: {text[at : at + 20]!r}")
        if match.lastgroup != "space":
            yield _Token(match.lastgroup or "", match.group(), line)
        line += match.group().count("\n")
        at = match.end()
    yield _Token("end", "the end", line)


def _bounds(token: _Token) -> str:
    """A repetition as Lark writes it."""
    if not token.text.startswith("{"):
        return token.text
    least, comma, most = "".join(token.text[1:-1].split()).partition(",")
    most = most if comma else least
    if int(most or least) > MAX_REPEATS or (most and int(most) < int(least)):
        raise _fail(token.line, f"{token.text} must be a range up to {MAX_REPEATS}")
    return f"{{{int(least)},{most and int(most)}}}"


def _characters(token: _Token, text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        match = _ESCAPE.match(text, at)
        if match is None:
            raise _fail(token.line, f"{token.text} ends in the middle of an escape")
        digits = match[1] or match[2] or match[3]
        if digits:
            if int(digits, 16) > 0x10FFFF or 0xD800 <= int(digits, 16) < 0xE000:
                raise _fail(token.line, f"{match[0]} is no character")
            yield chr(int(digits, 16))
        elif match[4]:
            if match[4].isalnum() and match[4] not in _SHORT:
                raise _fail(token.line, f"{match[0]} is not an escape")
            yield _SHORT.get(match[4], match[4])
        else:
            yield match[5]
        at = match.end()


def _set(token: _Token) -> str:
    """A set of characters as a regular expression, every character by its number."""
    inside = token.text[1:-1]
    negated = inside.startswith("^")
    inside = inside[negated:]
    is_range = [match[0] == "-" for match in _ESCAPE.finditer(inside)]
    characters = list(_characters(token, inside))
    ranges: list[str] = []
    at = 0
    while at < len(characters):
        first = last = characters[at]
        if at + 2 < len(characters) and is_range[at + 1]:
            last = characters[at + 2]
            at += 2
        if last < first:
            raise _fail(token.line, f"{token.text} has a range whose end is before its start")
        ranges.append(_numbered(first) if first == last else f"{_numbered(first)}-{_numbered(last)}")
        at += 1
    if not ranges:
        raise _fail(token.line, f"{token.text} is an empty set")
    return f"[{'^' if negated else ''}{''.join(ranges)}]"


def _numbered(character: str) -> str:
    return character if character.isascii() and character.isalnum() else f"\\u{{{ord(character):x}}}"


class _Writer:
    """Writes rules as Lark. Terminals have names in capitals there, rules in small letters."""

    def __init__(self, rules: dict[str, _Node]) -> None:
        self._rules = rules
        self._terminals = _regular_rules(rules)
        self._names = {name: f"{'T' if name in self._terminals else 'r'}{i}" for i, name in enumerate(rules)}
        self._lines: list[str] = []
        self._num_runs = 0

    def lark(self) -> str:
        for name, node in self._rules.items():
            body = self._terminal(node) if name in self._terminals else self._rule(node)
            self._lines.append(f"{self._names[name]}: {body}")
        return "\n".join([f"start: {self._names['root']}", *self._lines, ""])

    def _is_terminal(self, node: _Node) -> bool:
        if node.kind == "name":
            return node.text in self._terminals
        return all(self._is_terminal(part) for part in node.parts)

    def _rule(self, node: _Node) -> str:
        if self._is_terminal(node):
            return self._run([node])
        if node.kind == "name":
            return self._names[node.text]
        if node.kind == "repeat":
            return f"({self._rule(node.parts[0])}){node.text}"
        if node.kind == "choice":
            return "(" + " | ".join(self._rule(part) for part in node.parts) + ")"
        words: list[str] = []
        run: list[_Node] = []
        for part in node.parts:
            if self._is_terminal(part):
                run.append(part)
                continue
            if run:
                words.append(self._run(run))
                run = []
            words.append(self._rule(part))
        if run:
            words.append(self._run(run))
        return " ".join(words)

    def _run(self, nodes: list[_Node]) -> str:
        """A terminal for neighbours that are regular."""
        if len(nodes) == 1 and nodes[0].kind == "name":
            return self._names[nodes[0].text]
        self._num_runs += 1
        self._lines.append(f"A{self._num_runs}: {' '.join(self._terminal(node) for node in nodes)}")
        return f"A{self._num_runs}"

    def _terminal(self, node: _Node) -> str:
        match node.kind:
            case "text":
                return json.dumps(node.text, ensure_ascii=False)
            case "set":
                return f"/{node.text}/"
            case "name":
                return self._names[node.text]
            case "repeat":
                return f"({self._terminal(node.parts[0])}){node.text}"
            case "choice":
                return "(" + " | ".join(self._terminal(part) for part in node.parts) + ")"
        return "(" + " ".join(self._terminal(part) for part in node.parts) + ")" if node.parts else '""'


def _regular_rules(rules: dict[str, _Node]) -> set[str]:
    """Rules that refer to no rule but such as these, so that none is recursive."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    num_open: dict[str, int] = {}
    for name, node in rules.items():
        used = set(_references(node))
        num_open[name] = len(used)
        for other in used:
            users[other].append(name)
    ready = [name for name, count in num_open.items() if count == 0]
    regular: set[str] = set()
    while ready:
        name = ready.pop()
        regular.add(name)
        for user in users[name]:
            num_open[user] -= 1
            if num_open[user] == 0:
                ready.append(user)
    return regular


def _references(node: _Node) -> Iterator[str]:
    if node.kind == "name":
        yield node.text
    for part in node.parts:
        yield from _references(part)
