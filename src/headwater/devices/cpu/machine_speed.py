"""What this machine can do at best: bytes read from memory, and products in registers, by all threads of the pool."""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.kernel_library import KernelLibrary

_CHUNK_BYTES = 256 << 10
_CHUNKS_OF_A_PART = 32  # 8 MiB, read in less than a millisecond: others do not disturb all of the parts
_ROUNDS = 20_000  # of a chunk: about 0.1 ms


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """The rates of `num_threads` threads together. An addition and a multiplication are two operations."""

    num_threads: int
    read_gb_s: float
    gflop_s: float  # fused multiply-adds of float32
    int8_gop_s: float  # products of 8-bit integers


class FloorJob(ctypes.Structure):
    """`FloorJob` of kernels/machine/floor.c."""

    _fields_ = (
        ("addresses", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("num_chunks", ctypes.c_int64),
    )


def measure_speed(library: KernelLibrary, *, num_threads: int, limit_s: float = 0.05) -> MachineSpeed:
    """Measure each rate for about `limit_s`."""
    memory = np.ones(128 << 20, np.uint8)  # much more than the caches of most processors
    return MachineSpeed(
        num_threads,
        read_gb_s=measure_read_gb_s(library, [memory], num_threads=num_threads, limit_s=limit_s),
        gflop_s=_arithmetic(library, "fma_floor", num_threads, limit_s),
        int8_gop_s=_arithmetic(library, "dot_floor", num_threads, limit_s),
    )


def measure_read_gb_s(
    library: KernelLibrary, arrays: Sequence[npt.NDArray[np.uint8]], *, num_threads: int, limit_s: float = 0.05
) -> float:
    """The best rate at which the threads read contiguous arrays, a part after another. 0 for arrays of a few bytes."""
    starts = [
        np.arange(array.ctypes.data, array.ctypes.data + array.nbytes - _CHUNK_BYTES + 1, _CHUNK_BYTES, dtype=np.int64)
        for array in arrays
    ]
    addresses = np.concatenate(starts) if starts else np.zeros(0, np.int64)
    sums = np.zeros(_CHUNKS_OF_A_PART, np.float32)
    jobs = [
        FloorJob(addresses[first:].ctypes.data, sums.ctypes.data, _CHUNK_BYTES, min(len(addresses) - first, len(sums)))
        for first in range(0, len(addresses), len(sums))
    ]
    return _best_rate(library, "read_floor", jobs, num_threads, limit_s) * _CHUNK_BYTES / 1e9 if jobs else 0.0


def _arithmetic(library: KernelLibrary, kernel: str, num_threads: int, limit_s: float) -> float:
    """Billions of operations a second."""
    sums = np.zeros(8 * num_threads, np.float32)
    job = FloorJob(None, sums.ctypes.data, _ROUNDS, len(sums))
    operations = library.functions.hw_operations_a_round
    operations.restype = ctypes.c_int64
    per_round = operations(ctypes.c_int64(kernel == "dot_floor"))
    return _best_rate(library, kernel, [job], num_threads, limit_s) * _ROUNDS * per_round / 1e9


def _best_rate(
    library: KernelLibrary, kernel: str, jobs: Sequence[FloorJob], num_threads: int, limit_s: float
) -> float:
    """The most chunks a second of any job, in turns until `limit_s` has passed: others disturb some of them."""
    best, num_runs, until_s = 0.0, 0, time.perf_counter() + limit_s
    while num_runs < 2 or time.perf_counter() < until_s:
        job = jobs[num_runs % len(jobs)]
        began_s = time.perf_counter()
        library.run_on_threads(kernel, job, num_threads=num_threads)
        best = max(best, job.num_chunks / (time.perf_counter() - began_s))
        num_runs += 1
    return best
