"""What the doctor tries out: a store, the build of PyTorch beside the driver, a port that is taken."""

import socket
from contextlib import closing
from pathlib import Path

import pytest

from headwater.doctor import machine, torch_build
from headwater.doctor.finding import Level
from headwater.doctor.store import store
from headwater.storage.file.backend import FileBackend
from headwater.storage.memory import MemoryBackend


def test_a_store_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    found = store("file", directory=str(tmp_path / "pages"))
    assert found.level is Level.OK, found.text
    assert "wrote, read and deleted a page" in found.text
    with closing(FileBackend(tmp_path / "pages", capacity_bytes=1 << 20)) as backend:
        assert backend.usage().num_pages == 0


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = store("file", directory=str(tmp_path / "file" / "pages"))
    assert (found.level, found.remedy != "") == (Level.PROBLEM, True)


def test_a_server_that_is_not_there_is_a_problem_and_its_password_is_not_shown() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = store("redis", url=f"redis://:hunter2@127.0.0.1:{port}/0")
    assert found.level is Level.PROBLEM
    assert "redis://" in found.remedy
    assert "hunter2" not in found.text + str(found.facts)


def test_a_full_store_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.doctor.store.open_backend", lambda *_, **__: MemoryBackend(capacity_bytes=100))
    found = store("memory")
    assert (found.level, found.text) == (Level.PROBLEM, "memory: it is full")


@pytest.mark.parametrize(
    ("installed", "driver", "level", "text"),
    [
        ("2.11.0+cu130", (13, 1), Level.OK, "2.11.0+cu130, driver for CUDA 13.1"),
        ("2.11.0+cu130", (13, 0), Level.OK, "2.11.0+cu130, driver for CUDA 13.0"),
        ("2.11.0+cu130", (12, 8), Level.PROBLEM, "needs a driver for CUDA 13.0; this one is for 12.8"),
        ("2.11.0+cpu", (13, 0), Level.PROBLEM, "a build without CUDA"),
        ("2.11.0+cu130", None, Level.OK, "no NVIDIA driver, so it is not used"),
        ("2.11.0", (13, 0), Level.OK, "driver for CUDA 13.0"),
    ],
)
def test_the_build_of_torch_beside_the_driver(
    monkeypatch: pytest.MonkeyPatch, installed: str, driver: tuple[int, int] | None, level: Level, text: str
) -> None:
    monkeypatch.setattr(torch_build, "version", lambda name: installed)
    monkeypatch.setattr(torch_build, "has_driver", lambda: driver is not None)
    monkeypatch.setattr(torch_build, "driver_cuda", lambda: driver)
    found = torch_build.torch_build()
    assert found.level is level
    assert text in found.text
    assert (found.remedy != "") == (level is Level.PROBLEM)


def test_a_port_says_whether_a_server_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(5)
        assert machine.port(port).level is Level.NOTE
    assert not machine.answers_http(port)
