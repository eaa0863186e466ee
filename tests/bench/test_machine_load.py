"""Whose processor time it was: by /proc."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.bench import machine

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")


def test_the_listener_on_a_port_is_found_with_its_children() -> None:
    code = "import socket, subprocess, sys; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
    code += "print(s.getsockname()[1], child.pid, flush=True); sys.stdin.readline()\n"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        port, child = map(int, server.stdout.readline().split())
        assert machine.listeners_on(port) == [server.pid]
        assert {server.pid, child} <= set(machine.processes_of_server(port))
        server.stdin.write("\n")
    assert machine.listeners_on(port) == []


def test_a_listener_that_closes_a_connection_meanwhile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy server closes connections all the time: a descriptor that is listed may be gone when it is looked at."""
    closed, really = [], os.readlink

    def read(path: Path) -> str:
        if path.parent == Path(f"/proc/{os.getpid()}/fd") and not closed:
            closed.append(path)
            raise FileNotFoundError(path)
        return really(path)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(machine.os, "readlink", read)
        assert machine.listeners_on(listener.getsockname()[1]) == [os.getpid()]
    assert closed


def test_nobody_listens_on_a_free_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert machine.processes_of_server(probe.getsockname()[1]) == []


def test_own_work_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"busy": 100.0, "own": 10.0, "other": 5.0}
    monkeypatch.setattr(machine, "busy_s", lambda: now["busy"])
    monkeypatch.setattr(machine, "cpu_s", lambda pid: now["own"] if pid == os.getpid() else now["other"])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now["busy"] / 10)
    load = machine.ForeignLoad([4711])
    now |= {"busy": 120.0, "own": 14.0, "other": 10.0}  # 20 s busy in 2 s: 9 s were ours
    assert load.cores() == pytest.approx((20 - 9) / 2)


def test_without_proc_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.ForeignLoad([]).cores() is None
    assert machine.listeners_on(1) == []
