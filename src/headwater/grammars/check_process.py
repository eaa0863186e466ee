"""A process that makes grammars: some texts overflow the library's stack, or keep it busy for minutes.

It answers one line of JSON with another: `[kind, value, whitespace, closes_objects]` with `[text]`, or with path,
keyword and message of a GrammarError. It ends when its input does.
"""

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

from headwater.grammars.errors import GrammarError
from headwater.grammars.json_options import JsonOptions
from headwater.grammars.sources import (
    checked_lark,
    from_choice,
    from_ebnf,
    from_json_schema,
    from_regex,
    json_object,
)
from headwater.grammars.structural_tags import from_structural_tag

# no more than any thread that compiles the same grammar has, so that what passes here overflows no other
_STACK_BYTES = 2 << 20

MAKERS: dict[str, Callable[[Any, JsonOptions], str]] = {
    "json": lambda value, options: from_json_schema(value, options=options),
    "json_object": lambda _, options: json_object(options=options),
    "regex": lambda value, _: from_regex(value),
    "choice": lambda value, _: from_choice(value),
    "grammar": lambda value, _: from_ebnf(value),
    "made": lambda value, _: checked_lark(value),
    "structural_tag": lambda value, options: from_structural_tag(value, options=options),
}


def answer(line: str) -> str:
    """The answer to one line."""
    kind, value, whitespace, closes_objects = json.loads(line)
    options = JsonOptions(whitespace=whitespace, closes_objects=closes_objects)
    try:
        return json.dumps([MAKERS[kind](value, options)])
    except GrammarError as error:
        return json.dumps([error.path, error.keyword, error.message])
    except RecursionError:
        return json.dumps(["", "", "is nested too deeply"])


def _work(lines: "queue.SimpleQueue[str]") -> None:
    try:
        while True:
            print(answer(lines.get()), flush=True)
    finally:
        os._exit(1)  # an error of ours: the question must not wait for its time limit


def main() -> None:
    """Answer lines in a thread with a small stack. This thread notices the end of the input meanwhile."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.stack_size(_STACK_BYTES)
    threading.Thread(target=_work, args=(lines,), daemon=True).start()
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # the library may be busy for minutes


if __name__ == "__main__":
    main()
