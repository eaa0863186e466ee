"""The thread pool of the native kernels alone: every chunk once, and nobody spins while others work."""

import ctypes
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headwater.devices.cpu.native_build import SOURCES

COMPILER = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")

CHUNK_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)
Run = Callable[[Callable[[int], None], int, int], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(function, num_chunks, num_threads), with a pool compiled for any processor of this architecture."""
    target = tmp_path_factory.mktemp("pool") / "pool.so"
    command = [COMPILER, "-O2", "-std=gnu11", "-fPIC", "-shared", "-pthread", str(SOURCES / "pool.c")]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, timeout=60, check=False)
    if "immintrin.h" in done.stderr:
        pytest.skip("the pool pauses with an instruction of x86")
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(Path(target)))
    library.pool_run.argtypes = (CHUNK_FUNCTION, ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    library.pool_run.restype = None
    return lambda function, num_chunks, num_threads: library.pool_run(
        CHUNK_FUNCTION(lambda _, chunk: function(chunk)), None, num_chunks, num_threads
    )


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_chunk_runs_once(run: Run, num_threads: int) -> None:
    """A chunk claimed twice is written twice, one that is lost leaves what was in memory."""
    for num_chunks in (0, 1, 2, 3, 7, 64) * 20:
        counts = [0] * num_chunks

        def count(chunk: int, counts: list[int] = counts) -> None:
            counts[chunk] += 1

        run(count, num_chunks, num_threads)
        assert counts == [1] * num_chunks


def test_jobs_are_done_when_the_call_returns_also_after_sleeping(run: Run) -> None:
    """A worker that wakes late must not find the next job half set up."""
    for pause_s in (0.0, 0.002, 0.0) * 20:
        done = []
        run(lambda chunk, done=done: done.append(chunk), 9, 3)
        assert sorted(done) == list(range(9))
        time.sleep(pause_s)


def test_the_caller_sleeps_while_a_worker_computes(run: Run) -> None:
    """On shared cores a spinning caller keeps the core from the very worker it waits for."""
    caller = threading.get_ident()
    both_have_one = threading.Barrier(2, timeout=60)

    def wait_long(_: int) -> None:
        both_have_one.wait()
        if threading.get_ident() != caller:
            time.sleep(1.0)

    before_s = time.thread_time()
    run(wait_long, 2, 2)
    assert time.thread_time() - before_s < 0.03


def test_idle_workers_sleep(run: Run) -> None:
    """A server without requests must not warm a core."""
    run(lambda chunk: None, 16, 3)
    time.sleep(0.1)
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.25
