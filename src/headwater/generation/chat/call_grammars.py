"""Grammars of answers in which calls are allowed, made from the grammar of an answer that is a call."""

import json
import re

_RULE = re.compile(r"(\w+)(\[[^\]]*\])?: (.*)")
_ALTERNATIVES = re.compile(r"\w+( \| \w+)*")
_FIRST = re.compile(r'\s*(?:(?P<marker>"(?:[^"\\]|\\.)*"|<\[\d+\]>)|(?P<name>\w+))(?P<rest>.*)', re.DOTALL)
_MARKER = re.compile(r"[<\[].{4}", re.DOTALL)  # a bracket alone also begins ordinary text


def text_with_calls(calls: str, *, parallel: bool) -> str | None:
    """Lark text for free text in which calls may come, at most one without `parallel`.

    `calls`: Lark text for an answer that is calls and nothing else, all of which begin with one marker. Where the
    marker has been written, a call follows. None if there is no such marker.
    """
    rules = {found[1]: found[3] for line in calls.splitlines() if (found := _RULE.match(line))}
    rests: dict[str, str] = {}
    marker = _cut_marker("start", rules, rests)
    if marker is None:
        return None
    is_token = marker.startswith("<[")
    without = "" if is_token else f" & ~/(?s:.*){_escaped(json.loads(marker))}(?s:.*)/"
    before = f"before: ANY_TEXT? {marker}" if is_token else f"before[suffix={marker}]: ANY_TEXT"
    lines = [
        f"start: {'(before rest_of_start)* LAST_TEXT' if parallel else 'LAST_TEXT | before rest_of_start'}",
        before,
        "ANY_TEXT: /(?s:.*)/",
        f"LAST_TEXT: /(?s:.*)/{without}",
        *(f"{name}: {body}" for name, body in rests.items()),
        *(line for line in calls.splitlines() if not line.startswith("start: ")),
    ]
    return "\n".join(lines) + "\n"


def calls_or(calls: str, answer: str) -> str:
    """llguidance's grammar list for an answer that is calls, or what the grammar `answer` describes."""
    first, *others = _as_list(answer)
    either = calls.replace("start: ", "only_calls: ", 1) + "start: only_calls | @answer\n"
    return json.dumps({"grammars": [{"lark_grammar": either}, first | {"name": "answer"}, *others]}, ensure_ascii=False)


def _as_list(grammar: str) -> list[dict[str, object]]:
    """The grammars of a text that is Lark or a grammar list."""
    if grammar.lstrip().startswith("{"):
        return json.loads(grammar)["grammars"]
    return [{"lark_grammar": grammar}]


def _cut_marker(name: str, rules: dict[str, str], rests: dict[str, str]) -> str | None:
    """The marker with which a rule begins; adds what follows it to `rests`, as a rule `rest_of_NAME`."""
    body = rules.get(name)
    if body is None:
        return None
    if _ALTERNATIVES.fullmatch(body):
        names = body.split(" | ")
        markers = {_cut_marker(each, rules, rests) for each in names}
        rests[f"rest_of_{name}"] = " | ".join(f"rest_of_{each}" for each in names)
        return markers.pop() if len(markers) == 1 else None
    found = _FIRST.fullmatch(body)
    if found is None:
        return None
    if (inner := found["name"]) is not None:
        rests[f"rest_of_{name}"] = f"rest_of_{inner}{found['rest']}"
        return _cut_marker(inner, rules, rests)
    marker = found["marker"]
    rests[f"rest_of_{name}"] = found["rest"].strip() or '""'
    return marker if marker.startswith("<[") or _MARKER.match(json.loads(marker)) else None


def _escaped(text: str) -> str:
    """A text in one of Lark's regular expressions."""
    return re.sub(r"[][(){}|/\\.*+?^$-]", lambda found: "\\" + found[0], text).replace("\n", "\\n")
