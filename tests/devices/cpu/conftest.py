"""The compiled kernels, once for every instruction set that this CPU runs."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import sanitized
from linear_setting import MATRIX_PRODUCTS, PRODUCTS

from fake_machine import FakeMachine
from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, build, compile_library, usable_instruction_sets
from headwater.devices.cpu.kernel_library import KernelLibrary


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """This process believes to run on a machine without anything, until the test adds it."""
    return FakeMachine(tmp_path, monkeypatch)


@pytest.fixture(scope="session", params=[isa.name for isa in usable_instruction_sets()])
def library(request: pytest.FixtureRequest) -> KernelLibrary:
    isa = INSTRUCTION_SETS[request.param]
    if sanitized.LIBRARY:
        return KernelLibrary(Path(sanitized.LIBRARY), isa)
    try:
        return KernelLibrary(build(isa), isa)
    except RuntimeError as error:
        if "no C compiler" not in str(error):
            raise  # sources that do not compile are a failure
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """Products by AMX on any x86-64 processor: its tiles in plain C, the code around them as it is."""
    return _emulated("emulated-amx", PRODUCTS, "-O1", tmp_path_factory)


@pytest.fixture(scope="session")
def emulated_matrices(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """Of `emulated` what few products of whole matrices need: the compiler takes 7 s of CPU instead of 15."""
    return _emulated("emulated-matrices", MATRIX_PRODUCTS, "-O0", tmp_path_factory)


def _emulated(
    name: str, sources: Sequence[Path], optimisation: str, tmp_path_factory: pytest.TempPathFactory
) -> KernelLibrary:
    isa = INSTRUCTION_SETS["avx2"]
    if isa not in usable_instruction_sets():
        pytest.skip("needs AVX2")
    if sanitized.LIBRARY:
        return KernelLibrary(Path(sanitized.LIBRARY), isa)
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # one for the processes of a run
    path = folder / f"{name}.so"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            compile_library(isa, path, sources=sources, extra_options=(optimisation, "-DHEADWATER_EMULATE_AMX"))
    return KernelLibrary(path, isa)
