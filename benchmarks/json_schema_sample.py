#!/usr/bin/env python3
"""A sample of JSONSchemaBench against the grammars that the server makes: valid texts refused, invalid ones accepted.

    json_schema_sample.py DATA [--share 0.05] [--least 25] [--out RESULT.json]

DATA is `maskbench/data` of https://github.com/guidance-ai/jsonschemabench: a file for each schema, with texts that are
valid or not. The sample takes the first of each split after a shuffle with a fixed seed, 5 % but at least 25. Texts are
fed byte by byte, so the result does not depend on a model. A valid text that is refused is tried again with its
properties in other orders, since the server generates only the schema's. Exit code 1 if any text was judged
wrongly.
"""

import argparse
import collections
import json
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance

from headwater.grammars.errors import GrammarError
from headwater.grammars.sources import from_json_schema

Json = dict[str, Any]
_SPLIT = re.compile(r"(---.*|_[a-z_]+[0-9-]*\.json|[_-]?[0-9]+(-[0-9]+)*\.json)$")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--least", type=int, default=25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    tally = Tally()
    for path in sample(options.data, share=options.share, least=options.least):
        tally.add(path.stem, json.loads(path.read_text()))
    report = {"machine": platform.processor() or platform.machine(), "llguidance": llguidance.__version__}
    report |= {"share": options.share, "least": options.least} | tally.report()
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if tally.wrong else 0


def sample(folder: Path, *, share: float, least: int) -> list[Path]:
    """The same files on every machine."""
    splits: dict[str, list[Path]] = collections.defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        splits[_SPLIT.sub("", path.name)].append(path)
    chosen: list[Path] = []
    for name, paths in sorted(splits.items()):
        random.Random(name).shuffle(paths)
        chosen += paths[: max(least, round(share * len(paths)))]
    return chosen


class Tally:
    """Counts what was judged, and how."""

    def __init__(self) -> None:
        self._tokenizer = llguidance.LLTokenizer("byte")
        self._refused: collections.Counter[str] = collections.Counter()
        self._num = collections.Counter[str]()
        self._seconds: list[float] = []
        self.wrong: list[str] = []

    def add(self, name: str, case: Json) -> None:
        self._num["schemas"] += 1
        started_s = time.process_time()
        try:
            grammar = from_json_schema(case["schema"])
        except GrammarError as error:
            self._refused[error.keyword or _kind(error.message)] += 1
            return
        self._seconds.append(time.process_time() - started_s)
        start = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        for number, test in enumerate(case["tests"]):
            self._num["valid" if test["valid"] else "invalid"] += 1
            is_accepted = self._accepts(start.deep_copy(), test["data"])
            if test["valid"] and not is_accepted:
                is_accepted = Ordering(self._tokenizer).feed(start.deep_copy(), test["data"]) is not None
                self._num["valid only in the schema's order"] += is_accepted
            if is_accepted is not test["valid"]:
                self._num["valid refused" if test["valid"] else "invalid accepted"] += 1
                self.wrong.append(f"{name} {number}")

    def _accepts(self, matcher: Any, data: Any) -> bool:
        tokens = self._tokenizer.tokenize_bytes(json.dumps(data, ensure_ascii=False).encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def report(self) -> Json:
        ordered = sorted(self._seconds)
        return {
            **self._num,
            "refused in advance": sum(self._refused.values()),
            "by keyword": dict(self._refused.most_common()),
            "check_cpu_ms_p50": round(1e3 * statistics.median(ordered), 2),
            "check_cpu_ms_p95": round(1e3 * ordered[int(0.95 * (len(ordered) - 1))], 2),
            "wrong": self.wrong,
        }


class Ordering:
    """Feeds a value to a matcher with the properties of each object in whatever order the matcher takes."""

    def __init__(self, tokenizer: llguidance.LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._num_left = 50_000  # texts to try

    def feed(self, matcher: Any, value: Any) -> Any:
        """The matcher behind the value; None if no order was found."""
        if isinstance(value, dict):
            return self._members(self._text(matcher, "{"), list(value.items()), "")
        if not isinstance(value, list):
            return self._text(matcher, json.dumps(value, ensure_ascii=False))
        here = self._text(matcher, "[")
        for number, item in enumerate(value):
            here = here and self._text(here, ", " if number else "")
            here = here and self.feed(here, item)
        return here and self._text(here, "]")

    def _members(self, here: Any, left: list[tuple[str, Any]], comma: str) -> Any:
        if here is None or not left:
            return here and self._text(here, "}")
        for number, (name, value) in enumerate(left):
            behind = self._text(here, f"{comma}{json.dumps(name, ensure_ascii=False)}: ")
            behind = behind and self.feed(behind, value)
            if behind and (end := self._members(behind, left[:number] + left[number + 1 :], ", ")):
                return end
        return None

    def _text(self, matcher: Any, text: str) -> Any:
        self._num_left -= 1
        copy = matcher.deep_copy()
        tokens = self._tokenizer.tokenize_bytes(text.encode())
        return copy if self._num_left > 0 and copy.try_consume_tokens(tokens) == len(tokens) else None


def _kind(message: str) -> str:
    return re.sub(r"[\"'/(:].*", "", message).strip()[:60]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
