"""A fake machine with an AVX2 processor, and empty caches."""

from pathlib import Path

import pytest

from fake_machine import FakeMachine
from headwater.devices.cpu import kernel_build
from headwater.doctor import kernels, machine

AVX2_FLAGS = "fpu avx2 fma f16c bmi1 bmi2 movbe abm"


def make_pc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """Four cores with siblings, 8 GiB free, no GPU, a compiler, no kernels and no model yet."""
    pc = FakeMachine(tmp_path / "root", monkeypatch)
    pc.has_cores(4, num_siblings=2)
    pc.write("proc/cpuinfo", f"model name\t: Some CPU\nflags\t\t: {AVX2_FLAGS}")
    pc.write("proc/meminfo", f"MemAvailable: {8 << 20} kB")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HEADWATER_CACHE", raising=False)
    monkeypatch.delenv("HEADWATER_CPU_ISA", raising=False)
    monkeypatch.delenv("HEADWATER_NATIVE", raising=False)
    monkeypatch.setattr(kernel_build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(kernel_build.shutil, "which", lambda name: f"/usr/bin/{name}")
    for module in (kernel_build, kernels):
        monkeypatch.setattr(module, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    return pc
