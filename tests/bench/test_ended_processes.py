"""Whoever looks at another process meets its end at any moment, in the middle of a read too."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwater.bench import machine
from processes import ancestors_of, is_alive

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its input, and is as good as started: it has said so."""
    command = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def check_gone(pid: int) -> None:
    assert not is_alive(pid)
    assert machine.command_of(pid) == ancestors_of(pid) == machine.children_of(pid) == machine.open_files(pid) == []
    assert machine.stat_fields(pid) == []
    assert pid not in machine.all_processes()
    assert (machine.cpu_s(pid), machine.rss_mib(pid)) == (0.0, 0.0)


def test_a_process_that_runs_is_seen(child: subprocess.Popen[bytes]) -> None:
    assert is_alive(child.pid)
    assert machine.command_of(child.pid) == child.args
    assert ancestors_of(child.pid)[0] == os.getpid()
    assert child.pid in machine.children_of(os.getpid())
    assert sum(name.startswith("pipe:") for name in machine.open_files(child.pid)) == 2


def test_one_that_has_ended_is_gone_before_and_after_it_is_waited_for(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid) and child.pid in machine.children_of(os.getpid())
    child.wait()
    with pytest.raises(FileNotFoundError):
        Path(f"/proc/{child.pid}/stat").read_bytes()
    check_gone(child.pid)


@pytest.mark.parametrize("name", ["stat", "cmdline"])
def test_a_file_that_was_opened_before_the_end_cannot_be_read(child: subprocess.Popen[bytes], name: str) -> None:
    """What the kernel does, and the reason why FileNotFoundError alone is not enough."""
    with Path(f"/proc/{child.pid}/{name}").open("rb") as opened:
        end(child)
        with pytest.raises(ProcessLookupError):
            opened.read()


@pytest.mark.parametrize("look", [is_alive, machine.command_of, ancestors_of, machine.stat_fields])
def test_one_that_ends_between_open_and_read_is_gone(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, look: Any
) -> None:
    opens, really = [], io.open

    def open_and_end(file: Any, *arguments: Any, **options: Any) -> Any:
        opened = really(file, *arguments, **options)
        opens.append(str(file))
        end(child)
        return opened

    monkeypatch.setattr(io, "open", open_and_end)
    assert not look(child.pid)
    monkeypatch.undo()
    assert len(opens) == 1 and opens[0].startswith(f"/proc/{child.pid}/")
    check_gone(child.pid)


def test_one_that_ends_while_its_descriptors_are_listed_has_none(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.readlink

    def end_and_read(path: Any) -> str:
        end(child)
        return really(path)

    monkeypatch.setattr(os, "readlink", end_and_read)
    assert machine.open_files(child.pid) == []
