"""Building and choosing the CPU kernels: never a stale library, never instructions that the CPU lacks."""

import ctypes
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from headwater.devices.cpu import kernel_build, kernel_library
from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, chosen_instruction_set
from headwater.devices.cpu.kernel_library import KernelLibrary

AVX2 = INSTRUCTION_SETS["avx2"]
AMX = INSTRUCTION_SETS["avx512_amx"]
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86 processors")


def test_the_library_is_named_after_sources_and_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library of older sources or of another set under the same name would crash or compute nonsense."""
    names = {kernel_build.library_name(isa) for isa in INSTRUCTION_SETS.values()}
    monkeypatch.setattr(kernel_build, "SOURCES", tmp_path)
    for text in ("int x;", "int y;"):
        (tmp_path / "other.c").write_text(text)
        names.add(kernel_build.library_name(AVX2))
    assert len(names) == len(INSTRUCTION_SETS) + 2


@x86_only
@pytest.mark.parametrize(("flags", "expected"), [
    (AVX2.flags, "avx2"),
    (AVX2.flags | {"avx_vnni"}, "avx_vnni"),
    (INSTRUCTION_SETS["avx512"].flags | {"avx_vnni"}, "avx512"),
    (INSTRUCTION_SETS["avx512_bf16"].flags, "avx512_bf16"),
    (AMX.flags, "avx512_bf16"),  # not the default yet
    (AVX2.flags - {"fma"}, None),
])  # fmt: skip
def test_the_best_set_that_the_cpu_runs_is_chosen(
    monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], expected: str | None
) -> None:
    monkeypatch.delenv("HEADWATER_CPU_ISA", raising=False)
    monkeypatch.setattr(kernel_build, "cpu_flags", lambda: flags)
    isa = chosen_instruction_set()
    assert (isa.name if isa else None) == expected


@x86_only
@pytest.mark.parametrize("is_granted", [True, False])
def test_amx_is_used_only_where_linux_grants_its_registers(monkeypatch: pytest.MonkeyPatch, is_granted: bool) -> None:
    """Without the permission the first tile instruction would end the process."""
    monkeypatch.setattr(kernel_build, "cpu_flags", lambda: AMX.flags)
    monkeypatch.setattr(kernel_build, "may_use_tile_registers", lambda: is_granted)
    monkeypatch.setenv("HEADWATER_CPU_ISA", AMX.name)
    assert (AMX in kernel_build.usable_instruction_sets()) == is_granted
    if is_granted:
        assert chosen_instruction_set() == AMX
    else:
        with pytest.raises(ValueError, match="Linux does not grant"):
            chosen_instruction_set()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's permission")
def test_linux_is_asked_for_the_registers_of_amx() -> None:
    """Where the processor has none it must refuse, or the number of the call is wrong."""
    kernel_build.may_use_tile_registers.cache_clear()
    assert kernel_build.may_use_tile_registers() <= (kernel_build.cpu_flags() >= {"amx_tile"})


@x86_only
def test_a_set_can_be_forced_but_not_beyond_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_build, "cpu_flags", lambda: INSTRUCTION_SETS["avx512"].flags)
    monkeypatch.setenv("HEADWATER_CPU_ISA", "avx2")
    assert chosen_instruction_set() == AVX2
    for name, reason in (("avx512_bf16", "lacks: avx512_bf16, avx512_vnni"), ("neon", "neon"), ("sse9", "avx2, neon")):
        monkeypatch.setenv("HEADWATER_CPU_ISA", name)
        with pytest.raises(ValueError, match=reason):
            chosen_instruction_set()


def test_a_packaged_library_is_preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_build, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = kernel_build.library_name(AVX2)
    assert kernel_build.find(AVX2) is None
    for folder in (tmp_path / "cache/headwater/native", tmp_path / "packaged"):
        folder.mkdir(parents=True)
        (folder / name).touch()
        assert kernel_build.build(AVX2) == folder / name


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
def test_a_failing_compiler_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half a library would be loaded by the next server start."""
    (tmp_path / "broken.c").write_text("this is not C\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_build, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match=r"broken\.c"):
        kernel_build.build(AVX2)
    assert not any(path.is_file() for path in (tmp_path / "cache/headwater").rglob("*"))


def test_without_a_compiler_the_remedy_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernel_build, "PACKAGED", tmp_path)
    monkeypatch.setattr(kernel_build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernel_library, "chosen_instruction_set", lambda: AVX2)
    kernel_library.library_or_reason.cache_clear()
    try:
        assert kernel_library.kernel_library() is None
        assert kernel_library.kernels_origin() == kernel_library.REMEDY
    finally:
        kernel_library.library_or_reason.cache_clear()
    assert "pip install ziglang" in caplog.text


def test_ziglang_compiles_where_no_compiler_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernel_build.importlib.util, "find_spec", lambda name: object())
    commands = []
    monkeypatch.setattr(kernel_build.subprocess, "run", lambda command, **_: commands.append(command) or Done())
    kernel_build.compile_library(AVX2, tmp_path / "library.so")
    assert commands[0][:5] == [sys.executable, "-m", "ziglang", "cc", "-mcpu=x86_64_v3"]


class Done:
    returncode = 0


def test_without_a_compiler_the_command_says_so_and_fails(tmp_path: Path) -> None:
    """`make setup` then fetches one; passing silently, it would leave a server that computes in numpy."""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    script = (
        "import sys; sys.modules['ziglang'] = None\n"
        "from headwater.devices.cpu import kernel_build as k; k.PACKAGED = k.SOURCES; sys.exit(k.main())"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.startswith("CPU kernels not built: ")
    assert done.returncode == ("no C compiler found" in done.stderr), "only another compiler would help"


def test_where_the_system_compiler_fails_ziglang_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """gcc before 11 does not know -march=x86-64-v3, and a gcc without the C library's headers compiles nothing."""
    (tmp_path / "cc").write_text("#!/bin/sh\necho unknown option >&2; exit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernel_build.importlib.util, "find_spec", lambda name: object())
    real, commands = subprocess.run, []

    def run(command: list[str], **options: object) -> object:
        commands.append(command)
        return real(command, **options) if command[0].endswith("cc") else Done()

    monkeypatch.setattr(kernel_build.subprocess, "run", run)
    kernel_build.compile_library(AVX2, tmp_path / "library.so")
    assert commands[-1][:4] == [sys.executable, "-m", "ziglang", "cc"]
    monkeypatch.setattr(kernel_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="unknown option"):
        kernel_build.compile_library(AVX2, tmp_path / "library.so")


@pytest.mark.parametrize("count", [0, 1, 7, 16, 45])
@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_16_bit_numbers_round_like_the_reference(library: KernelLibrary, name: str, count: int) -> None:
    """To nearest, ties to even, with denormals, infinities and NaN; nothing behind the end is written."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 6e-8, 65504.0, 65520.0, 1.00390625, 1.01171875, 3.4e38]
    values = np.resize(np.array([*special, *np.random.default_rng(0).normal(size=40)], np.float32), count)
    narrow, wide = np.full(count + 1, 7, np.uint16), np.full(count + 1, 7, np.float32)
    functions, address = library.functions, lambda array: ctypes.c_void_p(array.ctypes.data)
    getattr(functions, f"hw_{name}_of_floats")(address(values), address(narrow), ctypes.c_int64(count))
    getattr(functions, f"hw_floats_of_{name}")(address(narrow), address(wide), ctypes.c_int64(count))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32) if name == "f16" else rounded_to_bf16(values)
    np.testing.assert_array_equal(wide[:count], expected)
    assert narrow[count] == wide[count] == 7


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), rounded)


def test_a_slower_set_that_was_asked_for_is_named_with_the_faster_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The variable was set once for a test, and stayed: the first lines of a server say so."""
    library = types.SimpleNamespace(path=tmp_path / "library.so", isa=AVX2)
    avx512 = kernel_build.INSTRUCTION_SETS["avx512_bf16"]
    monkeypatch.setattr(kernel_library, "library_or_reason", lambda: (library, ""))
    monkeypatch.setattr(kernel_library, "usable_instruction_sets", lambda: [avx512, AVX2])
    assert kernel_library.kernels_origin() == "compiled here; unset HEADWATER_CPU_ISA for the faster avx512_bf16"
    monkeypatch.setattr(kernel_library, "usable_instruction_sets", lambda: [AVX2])
    assert kernel_library.kernels_origin() == "compiled here"
