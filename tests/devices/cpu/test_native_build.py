"""Building the native kernels: never required, never a stale or foreign library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.devices.cpu import native_build


def test_the_library_is_named_after_sources_and_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library of older sources or of another CPU under the same name would crash or compute nonsense."""
    names = {native_build.library_path().name}
    monkeypatch.setattr(native_build, "cpu_flags", lambda: frozenset({"avx2"}))
    names.add(native_build.library_path().name)
    (tmp_path / "other.c").write_text("int x;")
    monkeypatch.setattr(native_build, "SOURCES", tmp_path)
    names.add(native_build.library_path().name)
    (tmp_path / "other.c").write_text("int y;")
    names.add(native_build.library_path().name)
    assert len(names) == 4


def test_a_cpu_without_the_instructions_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "cpu_flags", lambda: frozenset({"avx512f"}))
    with pytest.raises(RuntimeError, match="avx512_bf16"):
        native_build.build()
    assert not any(tmp_path.rglob("*.so"))


def test_no_compiler_is_no_error_of_the_command(tmp_path: Path) -> None:
    """`make setup` must pass on a machine without cc; the reason is said on stderr."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "headwater.devices.cpu.native_build"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "plain PyTorch" in done.stderr


def test_a_failing_compiler_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half a library would be loaded by the next server start."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "broken.c").write_text("this is not C\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native_build, "SOURCES", sources)
    monkeypatch.setattr(native_build, "missing_cpu_flags", list)
    if not any(native_build.shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler on this machine")
    with pytest.raises(RuntimeError, match=r"broken\.c"):
        native_build.build()
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
