"""The commands of the pages that start a server, and those that take seconds of CPU; `make test-pages` runs this file.

Each server is started with the options of its page and answers; then the other commands of its console run against it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from page_commands import PAGES, STARTS_SERVER, PageCommand, console_blocks, is_dear, why_elsewhere
from page_shell import PageShell
from running_server import START_LIMIT_S, RunningServer

from processes import held_port, number_of

CONSOLES = [
    commands
    for page in PAGES
    for block in console_blocks(page)
    if (commands := [command for command in block if not why_elsewhere(command)])
]
SERVING = [block for block in CONSOLES if any(STARTS_SERVER.match(command.text) for command in block)]
DEAR = [command for block in CONSOLES if block not in SERVING for command in block if is_dear(command)]
BENCH_LIMIT_S = 400.0


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> PageShell:
    return PageShell.make(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def page_server(shell: PageShell) -> Iterator[RunningServer]:
    with RunningServer("--model", str(shell.model)) as server:
        yield server.wait_healthy()


class Started:
    """A server that a page's command started; ended by Ctrl-C, as the pages say."""

    def __init__(self, shell: PageShell, command: PageCommand) -> None:
        self._port = held_port()
        self.url = f"http://127.0.0.1:{number_of(self._port)}"
        text = shell.replaced(command.text.rstrip("& "), url=self.url)
        if "--model" not in text:
            text = text.replace("headwater serve", f"headwater serve --model {shell.model}")
        self._command = command
        self._log = (shell.folder / "log").open("w+")
        self._process = subprocess.Popen(
            ["bash", "-c", text],
            cwd=shell.folder,
            env=shell.environment(self.url),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        """All it has printed so far."""
        return Path(self._log.name).read_text()

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not self._is_healthy():
            assert self._process.poll() is None, f"{self._command} has ended:\n{self.log}"
            assert time.monotonic() < deadline, f"{self._command} does not answer"
            time.sleep(0.1)

    def end(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGINT)
            self._process.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise
        finally:
            self._log.close()
            self._port.close()

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False, timeout=5).status_code == 200
        except httpx.TransportError:
            return False


@pytest.mark.parametrize("block", SERVING, ids=lambda block: str(block[0]))
def test_a_server_of_a_page_starts_and_its_console_succeeds(block: list[PageCommand], shell: PageShell) -> None:
    server: Started | None = None
    try:
        for command in block:
            if STARTS_SERVER.match(command.text):
                if server is not None:
                    server.end()
                server = Started(shell, command)
                server.wait_healthy()
                continue
            url = server.url if server else "http://127.0.0.1:9"
            done = shell.run(command.text, url=url, limit_s=BENCH_LIMIT_S)
            assert done.returncode == 0, f"{command}\n{done.stdout}"
    finally:
        if server is not None:
            server.end()


@pytest.mark.parametrize("command", DEAR, ids=str)
def test_a_dear_command_succeeds(command: PageCommand, shell: PageShell, page_server: RunningServer) -> None:
    done = shell.run(command.text, url=page_server.url, limit_s=BENCH_LIMIT_S)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    assert done.stdout.strip(), f"{command} printed nothing"
