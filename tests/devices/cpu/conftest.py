"""The compiled kernels, once for every instruction set that this CPU runs."""

from pathlib import Path

import pytest
import sanitized

from fake_machine import FakeMachine
from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, build, usable_instruction_sets
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
