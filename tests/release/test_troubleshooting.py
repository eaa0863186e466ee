"""docs/troubleshooting.md names messages that the server has: nobody finds one that was reworded."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESSAGE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
LEAST = 6  # characters of a part that are compared


@functools.cache  # not as the file is collected, which every process does: seconds
def texts() -> str:
    """All texts of the source. Those that Python joins are joined; what is put in is a bar."""
    found: list[str] = []
    for file in (ROOT / "src" / "headwater").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "|" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


MESSAGES = MESSAGE.findall((ROOT / "docs" / "troubleshooting.md").read_text())


def pattern_of(message: str) -> re.Pattern[str]:
    """In one text, with anything short for `…`."""
    return re.compile(r"[^\n]{0,60}?".join(re.escape(part) for part in message.split("…")))


def is_in_source(message: str) -> bool:
    return pattern_of(message).search(texts()) is not None


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_source(message: str) -> None:
    assert max(len(part.strip()) for part in message.split("…")) >= LEAST
    assert is_in_source(message)


def test_the_page_has_messages_and_a_wrong_one_is_noticed() -> None:
    assert len(MESSAGES) > 35
    assert not is_in_source("the queue is crowded: …")
