"""The executor of CPU programs (kernels/run.c, pool.c): every chunk once, ops in order, on any number of threads."""

import shutil
import subprocess
from pathlib import Path

import pytest

from headwater.devices import cpu

KERNELS = Path(cpu.__file__).parent / "kernels"
STRESS = Path(__file__).parent / "run_stress.c"


def _compile(program: Path, *options: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    sources = [str(path) for path in (STRESS, KERNELS / "run.c", KERNELS / "pool.c", KERNELS / "machine" / "pin.c")]
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}", *options, *sources]
    subprocess.run([*command, "-pthread", "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compile(tmp_path_factory.mktemp("run") / "stress", "-O2")


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
def test_every_chunk_runs_once_and_after_the_op_before_it(stress: Path, num_threads: int) -> None:
    """A claim of a chunk that is gone, or an op that begins early, would read sums that are not finished."""
    subprocess.run([str(stress), str(num_threads), "400"], check=True, timeout=100)


@pytest.mark.slow
def test_threads_share_nothing_without_order(tmp_path: Path) -> None:
    """The thread sanitizer sees a barrier that is missing even where it goes well."""
    program = _compile(tmp_path / "stress", "-O1", "-g", "-fsanitize=thread")
    subprocess.run([str(program), "3", "60"], check=True, timeout=200)
