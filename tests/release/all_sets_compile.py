"""The kernels of sets that this CPU cannot run are at least compiled: `make test-isa` runs this, with every set."""

import platform
import shutil
from pathlib import Path

import pytest

from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, InstructionSet, compile_library

SETS = [isa for isa in INSTRUCTION_SETS.values() if isa.machine == platform.machine()]


@pytest.mark.parametrize("isa", SETS, ids=lambda isa: isa.name)
def test_every_set_of_this_machine_compiles_without_a_warning(isa: InstructionSet, tmp_path: Path) -> None:
    """An intrinsic that a set lacks is an error.

    Without optimisation, which takes most of the time. The sets that this CPU runs are optimised for other tests.
    """
    if not (compiler := next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)):
        pytest.skip("needs a C compiler")
    command = [compiler, *isa.options]  # no other one, which might not warn
    compile_library(isa, tmp_path / "library.so", compiler=command, extra_options=("-O0", "-Werror"))
