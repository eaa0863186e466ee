"""Each finding of the doctor: ok, a note or a problem, with what the user can do."""

import socket
from collections import namedtuple
from pathlib import Path

import pytest
from fake_pc import AVX2_FLAGS, make_pc

from fake_machine import FakeMachine
from headwater.devices.cpu import kernel_build
from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, library_name
from headwater.doctor import machine
from headwater.doctor.finding import Level
from headwater.doctor.kernels import kernels


@pytest.fixture
def pc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return make_pc(tmp_path, monkeypatch)


def test_the_processor_and_what_would_compute(pc: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.processor()
    assert found.level is Level.OK
    assert found.text == "Some CPU, 4 cores, 8 threads; computes on 4 threads, pinned"
    assert found.facts["pinned_cpus"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    pc.write("sys/fs/cgroup/cpu.max", "150000 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    text = machine.processor().text
    assert "cgroup quota 1.5 CPUs, OMP_NUM_THREADS=3; computes on 1 thread, not pinned" in text


def test_nodes_are_named_where_there_are_several(pc: FakeMachine) -> None:
    pc.has_cores(4, num_nodes=2)
    assert "2 NUMA nodes" in machine.processor().text


def test_kernels_that_are_not_compiled_yet(pc: FakeMachine) -> None:
    """The first start would take a minute, and nobody would know why."""
    found, library = kernels()
    assert (found.level, library) == (Level.NOTE, None)
    assert "avx2 (the only set that it has), not compiled yet" in found.text
    assert "kernel_build" in found.remedy
    assert found.facts["usable"] == ["avx2"]
    assert found.facts["flags"] == ["abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"], "those that sets need"


def test_no_compiler_is_a_problem(pc: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(kernel_build.importlib.util, "find_spec", lambda name: None)
    found, _ = kernels()
    assert found.level is Level.PROBLEM
    assert "many times slower" in found.text
    assert "pip install ziglang" in found.remedy


def test_a_library_that_does_not_load_is_a_problem(pc: FakeMachine, tmp_path: Path) -> None:
    folder = tmp_path / "packaged"
    folder.mkdir()
    (folder / library_name(INSTRUCTION_SETS["avx2"])).write_bytes(b"half a file")
    found, library = kernels()
    assert (found.level, library) == (Level.PROBLEM, None)
    assert str(folder) in found.remedy


@pytest.mark.parametrize("wanted", ["avx512", "sse9"])
def test_a_wish_that_cannot_be_met_is_a_problem(
    pc: FakeMachine, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    """`serve` refuses to start with it."""
    monkeypatch.setenv("HEADWATER_CPU_ISA", wanted)
    found, _ = kernels()
    assert found.level is Level.PROBLEM
    assert f"HEADWATER_CPU_ISA={wanted}" in found.text
    assert found.remedy == "unset HEADWATER_CPU_ISA, or take one of: avx2"


def test_the_choice_says_why(pc: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_CPU_ISA", "avx2")
    assert "avx2 (by HEADWATER_CPU_ISA)" in kernels()[0].text
    monkeypatch.delenv("HEADWATER_CPU_ISA")
    pc.write("proc/cpuinfo", f"flags\t: {AVX2_FLAGS} avx_vnni")
    assert "avx_vnni (the best of avx_vnni, avx2)" in kernels()[0].text
    monkeypatch.setenv("HEADWATER_NATIVE", "0")
    found, _ = kernels()
    assert (found.level, found.remedy) == (Level.NOTE, "unset HEADWATER_NATIVE")


def test_a_processor_without_kernels(pc: FakeMachine) -> None:
    pc.write("proc/cpuinfo", "model name\t: Old CPU\nflags\t\t: fpu sse2")
    found, _ = kernels()
    assert found.level is Level.NOTE
    assert "none are written for this processor" in found.text


def test_memory(pc: FakeMachine) -> None:
    found = machine.memory()
    assert (found.level, found.text) == (Level.OK, "8.0 GiB free")
    pc.write("sys/fs/cgroup/memory.max", str(900 << 20))
    pc.write("sys/fs/cgroup/memory.current", str(500 << 20))
    found = machine.memory()
    assert found.level is Level.PROBLEM, "the server would be killed"
    assert found.text == "0.4 GiB free, cgroup limit 0.9 GiB: little for a server"
    assert found.remedy


@pytest.mark.parametrize(
    ("has_driver", "installed", "level", "text"),
    [
        (False, set(), Level.OK, "no NVIDIA driver"),
        (True, {"torch", "triton"}, Level.OK, "PyTorch are installed"),
        (True, {"torch"}, Level.NOTE, "triton not: computes on the CPU"),
        (True, set(), Level.NOTE, "torch and triton not: computes on the CPU"),
    ],
)
def test_a_gpu_that_nothing_uses_is_noted(
    pc: FakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    has_driver: bool,
    installed: set[str],
    level: Level,
    text: str,
) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: has_driver)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name in installed or None)
    found = machine.gpu()
    assert found.level is level
    assert text in found.text
    assert bool(found.remedy) == (level is Level.NOTE)


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's folder does not exist before the first start."""
    usage = namedtuple("usage", "total used free")
    folder = tmp_path / "not" / "yet"
    assert machine.disk(folder).level is Level.OK
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(1, 1, 1 << 20))
    found = machine.disk(folder)
    assert found.level is Level.PROBLEM
    assert "HEADWATER_CACHE" in found.remedy


def test_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        taken = machine.port(number)
        assert taken.level is Level.NOTE
        assert "--port" in taken.remedy
    assert machine.port(number).text == f"{number} is free"
