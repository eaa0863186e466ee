"""The AArch64 kernels on a machine of another kind: cross-compiled with ziglang, and their tests run under qemu-user.

CONTRIBUTING.md says how. qemu checks results, not speed, and not the order of memory accesses of an Arm processor:
test_run.py's thread sanitizer looks for what depends on that.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, InstructionSet, compile_library, library_name

ROOT_VARIABLE = "HEADWATER_AARCH64_ROOT"  # an AArch64 userland, as aarch64_root.sh makes it
FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[2]
SETS = [isa for isa in INSTRUCTION_SETS.values() if isa.machine == "aarch64"]
ELF_MACHINE_AARCH64 = 183
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the ziglang wheel"),
]


def cross_compile(isa: InstructionSet, output: Path) -> None:
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", f"-mcpu={isa.zig_cpu}"]
    compile_library(isa, output, compiler=compiler, extra_options=("-Werror",))


@pytest.mark.parametrize("isa", SETS, ids=lambda isa: isa.name)
def test_every_set_compiles_without_a_warning(isa: InstructionSet, tmp_path: Path) -> None:
    cross_compile(isa, tmp_path / "kernels.so")
    header = (tmp_path / "kernels.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") == ELF_MACHINE_AARCH64


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the emulated Python finds the libraries."""
    cache = tmp_path_factory.mktemp("aarch64")
    (cache / "headwater/native").mkdir(parents=True)
    for isa in SETS:
        cross_compile(isa, cache / "headwater/native" / library_name(isa))
    return cache


# A processor with every extension, and one with dotprod alone.
@pytest.mark.timeout(7200)
@pytest.mark.skipif(ROOT_VARIABLE not in os.environ, reason=f"needs {ROOT_VARIABLE}: minutes under qemu")
@pytest.mark.parametrize(("cpu", "sets"), [("max", {isa.name for isa in SETS}), ("neoverse-n1", {"neon"})])
@pytest.mark.parametrize("tests", ["test_row_kernels.py", "test_attention_kernels.py", "test_linear_kernels.py"])
def test_kernels_are_right_under_qemu(libraries: Path, cpu: str, sets: set[str], tests: str) -> None:
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    assert emulator, "needs qemu-user"
    root = Path(os.environ[ROOT_VARIABLE])
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root / 'site'}:{REPOSITORY / 'src'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(libraries),
    }
    python = [emulator, "-L", str(root), "-cpu", cpu, str(root / "usr/bin/python3")]
    options = ["-x", "-v", "-p", "no:cacheprovider", "-o", "timeout=3600", "-o", "faulthandler_timeout=0"]
    command = [*python, "-m", "pytest", *options, "-k", "not _tiles_", str(FOLDER / tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in INSTRUCTION_SETS:  # the sets are in the names of the tests
        assert bool(re.search(rf"\[{name}[-\]]", done.stdout)) == (name in sets), name
    assert "SKIPPED" not in done.stdout
