"""The commands of README.md's table "Why not just SGLang or vLLM" work as they stand, on a server that generates."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import RunningServer
from tiered import TIERS, prompt

README = Path(__file__).parents[2] / "README.md"
COMMAND = re.compile(r"`((?:headwater|curl) .*?)` \|")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("curl") is None, reason="the table's commands use curl"),
]


def commands() -> list[str]:
    section = README.read_text().split("## Why not just SGLang or vLLM", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [match[1].replace(r"\|", "|") for row in rows if (match := COMMAND.search(row))]


@pytest.fixture(scope="module")
def busy_server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with all three tiers that answers one long request after another."""
    store = tmp_path_factory.mktemp("store")
    storage = ("--hicache-storage-backend", "file", "--hicache-storage-dir", str(store))
    with RunningServer("--model", tiny_model, *TIERS, *storage) as server:
        server.wait_healthy()
        is_over = threading.Event()

        def generate() -> None:
            body = {"input_ids": prompt(0), "sampling_params": {"max_new_tokens": 120, "ignore_eos": True}}
            while not is_over.is_set():
                assert server.post("/generate", json=body).status_code == 200

        load = threading.Thread(target=generate)
        load.start()
        yield server
        is_over.set()
        load.join()


def test_the_table_has_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_succeeds(command: str, busy_server: RunningServer, tiny_model: str) -> None:
    """A renamed option or route, or an answer that is an error: curl fails on 4xx, `headwater` has exit codes."""
    words = [tiny_model if word == "FOLDER" else word for word in shlex.split(command)]
    if words[0] == "headwater":
        words[:1] = [sys.executable, "-m", "headwater"]
    else:
        words[1:1] = ["--fail-with-body", "--silent", "--show-error", "--noproxy", "*"]
    words = [word.replace("localhost:30000", busy_server.url.removeprefix("http://")) for word in words]
    env = os.environ | {"HEADWATER_URL": busy_server.url}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{command} printed nothing"
