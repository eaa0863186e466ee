"""The tests of the kernels once more, on a library that checks every address and all undefined behaviour.

`make test-isa` runs this file, `make test` does not: the compiler and the tests take a minute of CPU.
numpy's arrays come from the sanitizer's malloc, so a read or write beside one ends the process with a report.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from linear_setting import PRODUCTS
from sanitized import VARIABLE

from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, SOURCES, compile_library, usable_instruction_sets

FOLDER = Path(__file__).parent
# Bad pointers show at the access, as bad addresses; looking for them earlier doubles the time of the compiler.
_LEFT_OUT = "-fno-sanitize=null,object-size,pointer-overflow"
OPTIONS = ("-O1", "-g1", "-fsanitize=address,undefined", _LEFT_OUT, "-fno-sanitize-recover=all")
PYTEST = ("-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc and its libasan")]


@pytest.fixture(scope="module", params=usable_instruction_sets()[-1:], ids=lambda isa: isa.name)
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of one set: the sources are the same for all, and this compiler needs a minute for each."""
    path = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    compile_library(request.param, path, compiler=["gcc", *request.param.options], extra_options=OPTIONS)
    return path


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        VARIABLE: str(library),
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until its end
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=560, check=False
    )


@pytest.mark.timeout(600)  # the compiler, then Python with a slow allocator: minutes where others take the cores
def test_kernels_touch_only_their_memory(sanitized: Path) -> None:
    tests = [*sorted(map(str, FOLDER.glob("test_*_kernels.py"))), str(FOLDER / "experts" / "test_experts.py")]
    assert_clean(run(sanitized, *PYTEST, *tests, "-k", "not _tiles_"))


def test_tiles_touch_only_their_memory(tmp_path: Path) -> None:
    """AMX in plain C, and the code around it as it is. The formats that are left out are read as the others are."""
    path, isa = tmp_path / "kernels.so", INSTRUCTION_SETS["avx2"]
    options = ("-DHEADWATER_EMULATE_AMX", *OPTIONS)
    sources = (*PRODUCTS, SOURCES / "attention.c", SOURCES / "rotary.c")
    compile_library(isa, path, sources=sources, compiler=["gcc", *isa.options], extra_options=options)
    tests = [str(FOLDER / f"test_{name}.py") for name in ("linear_kernels", "cpu_layers", "attention_kernels")]
    chosen = "(_tiles_ and (Q4_1 or bfloat16)) or (every_kv_dtype and (bfloat16-64 or bfloat16-72))"
    assert_clean(run(path, *PYTEST, *tests, "-k", chosen))


def assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


def test_the_sanitizer_would_notice(sanitized: Path) -> None:
    """A write of one number behind an array must fail, else the tests above prove nothing."""
    code = (
        "import ctypes, os, numpy as np; library = ctypes.CDLL(os.environ['HEADWATER_SANITIZED_KERNELS']);"
        "x, y = np.zeros(9, np.uint16), np.zeros(8, np.float32);"
        "library.hw_floats_of_f16(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(9))"
    )
    done = run(sanitized, "-c", code)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
