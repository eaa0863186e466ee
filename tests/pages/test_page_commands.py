"""Every command of a console of README.md and docs/ runs, on one server; page_servers.py has those that start one.

page_commands.py lists the commands that run elsewhere or nowhere, each with the reason. A new command of a page
is run here unless it is listed there.
"""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from page_commands import (
    PAGES,
    STARTS_SERVER,
    PageCommand,
    console_blocks,
    is_dear,
    why_elsewhere,
)
from page_shell import PageShell
from running_server import RunningServer

BLOCKS = [
    block
    for page in PAGES
    for commands in console_blocks(page)
    if not any(STARTS_SERVER.match(command.text) for command in commands)
    and (block := [command for command in commands if not why_elsewhere(command) and not is_dear(command)])
]
STORE = ("--enable-hierarchical-cache", "--hicache-storage-backend", "file", "--hicache-storage-dir")

needs_tools = pytest.mark.skipif(shutil.which("curl") is None, reason="the pages' commands use curl")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> PageShell:
    return PageShell.make(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def page_server(shell: PageShell) -> Iterator[RunningServer]:
    """With all tiers and the metrics of all of them, as the pages show."""
    options = ("--model", str(shell.model), "--dtype", "float32", "--max-total-tokens", "8192", *STORE)
    with RunningServer(*options, str(shell.folder / "pages")) as server:  # the folder of the pages: one breaks it
        yield server.wait_healthy()


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Of commands that several pages show."""
    return {}


@pytest.mark.slow
@needs_tools
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(block[0]))
def test_the_commands_of_a_console_succeed(
    block: list[PageCommand], shell: PageShell, page_server: RunningServer, answers: dict[str, Any]
) -> None:
    """A renamed option or route, a parameter that is gone, a file that was moved: the page is wrong."""
    for command in block:
        if re.match(r"(?:\.venv/bin/)?headwater top", command.text):
            code = shell.run_in_terminal(command.text, url=page_server.url, until="tokens", keys="q")
            assert code == 0, command
            continue
        done = answers.get(command.text) or shell.run(command.text, url=page_server.url)
        if "headwater doctor" in command.text:
            answers[command.text] = done  # it measures the machine, for a second
        if command.text.endswith("# prints nothing"):
            assert not done.stdout, f"{command}\n{done.stdout}"
            continue
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        is_quiet = re.match(r"curl -f .*/ready$|python |mv |rm ", command.text)
        assert done.stdout.strip() or is_quiet, f"{command} printed nothing"
        if "release_memory_occupation" in command.text:
            assert page_server.post("/resume_memory_occupation", json={}).status_code == 200
