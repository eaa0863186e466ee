"""Commands in the pages are commands: each `headwater` line parses, each curl asks for a route that there is."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from page_commands import BLOCK, PAGES, console_blocks

from docs_reference import openapi
from headwater.cli.main import app

OURS = re.compile(r"(?:127\.0\.0\.1|localhost|\$\w+|HOST|server):?(?:30000|8000|\d{4,5}|PORT)?(/[^\s\"'?#]*)")
INLINE = re.compile(r"`(headwater [a-z][^`\n]* [^`\n]+)`")  # with arguments: `headwater serve` alone says little
WRAPPERS = {"sudo", "timeout", "nohup", "exec", "time", "uvx", "srun"}
# pages whose commands are those of others: servers that answer there are not ours
OTHER_PORTS = ("8265", "9090", "3000", "4318")
STANDS_FOR = {"...", "…"}


def commands(page: Path) -> Iterator[str]:
    """The commands of a page's consoles, with continued lines joined, and those in its text. No output."""
    for command in INLINE.findall(BLOCK.sub("", page.read_text())):
        if "|" not in command and not command.split()[-1].startswith("--"):  # it names a flag, or a choice
            yield re.sub(r" N\b", " 1", command)
    for block in console_blocks(page):
        yield from (re.sub(r"\\\n\s*", "", command.text) for command in block)


def words_of(command: str) -> list[list[str]]:
    """The words of each simple command in a line of shell; none if it is more than that."""
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = list(lexer)
    except ValueError:
        return []
    found: list[list[str]] = [[]]
    is_target = False
    for word in words:
        if set(word) <= set("|&;"):
            found.append([])
        elif set(word) <= set("<>"):
            is_target = True
            if found[-1] and found[-1][-1].isdigit():
                found[-1].pop()  # 2> names a descriptor
        elif not is_target:
            found[-1].append(word)
        else:
            is_target = False
    return found


def headwater_arguments(words: list[str]) -> list[str] | None:
    """What follows `headwater`; None if the command is another."""
    rest = list(words)
    while rest and ("=" in rest[0] or rest[0] in WRAPPERS or rest[0].isdigit()):
        rest = rest[1:]
    if rest[1:3] == ["-m", "headwater"] and "python" in rest[0]:
        return rest[3:]
    return rest[1:] if rest and rest[0].split("/")[-1] == "headwater" else None


def parse(arguments: list[str]) -> None:
    """Raises click.UsageError for what the real command line would refuse."""
    context: click.Context = app.make_context("headwater", list(arguments))
    command: click.Command = app
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        if not rest and command.invoke_without_command:
            return
        name, below, rest = command.resolve_command(context, rest)
        assert below is not None
        context, command = below.make_context(name, rest, parent=context), below


PARSED = [
    pytest.param(arguments, id=f"{page.name}: {' '.join(arguments)[:60]}")
    for page in PAGES
    for command in commands(page)
    for words in words_of(command)
    if (arguments := headwater_arguments(words)) and not STANDS_FOR & set(arguments)
]


@pytest.mark.parametrize("arguments", PARSED)
def test_a_command_line_parses(arguments: list[str]) -> None:
    try:
        parse(arguments)
    except click.exceptions.Exit:
        pass  # --help
    except click.UsageError as error:
        if re.search(r"(File|Path) '[\w./-]+' does not exist", error.format_message()):
            return  # a file of the reader
        pytest.fail(f"headwater {' '.join(arguments)}: {error.format_message()}")


def test_the_test_reads_the_pages_and_notices() -> None:
    assert len(PARSED) > 60
    with pytest.raises(click.UsageError):
        parse(["flush", "--mode", "soon"])
    with pytest.raises(click.UsageError):
        parse(["serve", "--no-such-flag"])
    assert headwater_arguments(["A=1", ".venv/bin/headwater", "flush"]) == ["flush"]
    assert words_of("headwater serve 2> log | grep x") == [["headwater", "serve"], ["grep", "x"]]


@pytest.fixture(scope="module")
def routes() -> list[tuple[re.Pattern[str], set[str]]]:
    document: dict[str, Any] = openapi()
    return [
        (re.compile(re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(path)).replace("\\", "\\")), {m.upper() for m in methods})
        for path, methods in document["paths"].items()
    ]


CURLS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
    for page in PAGES
    for command in commands(page)
    for words in words_of(command)
    if words and words[0] == "curl"
]
NOT_IN_THE_DOCUMENT = {"/openapi.json", "/docs", "/dashboard"}  # pages


@pytest.mark.parametrize("words", CURLS)
def test_a_curl_asks_for_a_route(words: list[str], routes: list[tuple[re.Pattern[str], set[str]]]) -> None:
    method = "GET"
    if any(re.fullmatch(r"-d|--data.*|-T|--json|-F", word) for word in words):
        method = "POST"
    for index, word in enumerate(words):
        if word in ("-X", "--request"):
            method = words[index + 1]
        elif re.fullmatch(r"-s?X(\w+)", word):
            method = word.partition("X")[2]
        elif re.fullmatch(r"-\w*I", word):
            method = "GET"  # HEAD is there for every GET
    for word in words:
        if any(f":{port}" in word for port in OTHER_PORTS):
            continue
        for path in OURS.findall(word):
            if path in NOT_IN_THE_DOCUMENT or "..." in path:
                continue
            fitting = [methods for pattern, methods in routes if pattern.fullmatch(path.rstrip("/") or "/")]
            allowed = set().union(*fitting)
            assert method in allowed, f"{method} {path}: {sorted(allowed) or 'no such route'}"


def test_there_are_curls() -> None:
    assert len(CURLS) > 30
