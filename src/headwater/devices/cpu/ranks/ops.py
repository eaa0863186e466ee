"""Ops of a CPU program in which ranks meet: sums over ranks, and the logits of all ranks for rank 0."""

import ctypes
from collections.abc import Sequence
from functools import partial

import numpy as np

from headwater.devices.cpu.plain.norm import Floats
from headwater.devices.cpu.program import Array, Numbers, Program, StepArrays
from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.segment import BEST_BYTES, logits_start
from headwater.devices.cpu.row_ops import MostProbable

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class PublishJob(ctypes.Structure):
    """`PublishJob` of kernels/ranks/ranks.c: rows of this rank into their columns of the rows of all ranks."""

    _fields_ = (
        ("ranks", _POINTER),
        ("x", _POINTER),
        ("row_bytes", _INT64),
        ("start", _INT64),
        ("stride", _INT64),
        ("first", _INT64),
        ("is_wanted", _INT64),
        ("rows", _INT64),
    )


class MeetJob(ctypes.Structure):
    """`MeetJob` of kernels/ranks/ranks.c."""

    _fields_ = (("ranks", _POINTER),)


class AddRanksJob(ctypes.Structure):
    """`AddRanksJob` of kernels/ranks/ranks.c: the sum over ranks, in their order."""

    _fields_ = (("ranks", _POINTER), ("y", _POINTER), ("width", _INT64), ("keeps", _INT64), ("rows", _INT64))


def all_reduce(x: Array, ranks: CpuRanks) -> Array:
    """Record x = the sum of x over all ranks."""
    _publish_part(x, ranks)
    _add_ranks(x, ranks, keeps=False)
    return x


def add_reduced(residual: Array, x: Array, ranks: CpuRanks) -> None:
    """Record residual += the sum of x over all ranks."""
    _publish_part(x, ranks)
    _add_ranks(residual, ranks, keeps=True)


class GatheredLogits:
    """The logits of each rank's part of the vocabulary, gathered where rank 0 reads them.

    The most probable token of each part always is; all logits are if `is_whole`, which holds for the steps to come.
    Every rank must choose the same.
    """

    def __init__(
        self, logits: Array, best: MostProbable, ranks: CpuRanks, *, firsts: Sequence[int], vocab_size: int
    ) -> None:
        """Record the ops. `best` are the most probable of this rank's `logits`.

        `firsts` are the first tokens of the ranks' parts, in order.
        """
        self._ranks = ranks
        self._vocab_size = vocab_size
        self._firsts = np.array(firsts, dtype=np.int32)
        self._start = logits_start(size=ranks.size)
        at = ranks.rank * BEST_BYTES
        for offset, array in zip((0, 4, 8), best, strict=True):
            _publish(array, ranks, start=0, stride=ranks.size * BEST_BYTES, first=at + offset)
        self._job = _publish(logits, ranks, start=self._start, stride=4 * vocab_size, first=4 * firsts[ranks.rank])
        _meet(logits.program, ranks)

    @property
    def is_whole(self) -> bool:
        return bool(self._job.is_wanted)

    @is_whole.setter
    def is_whole(self, value: bool) -> None:
        self._job.is_wanted = int(value)

    def logits(self, num_rows: int) -> Floats:
        """float32[num_rows, vocab_size] of the newest run, for rank 0 to read and overwrite before the next."""
        end = self._start + 4 * num_rows * self._vocab_size
        return self._ranks.buffer_to_read()[self._start : end].view(np.float32).reshape(num_rows, self._vocab_size)

    def most_probable(self, num_rows: int) -> tuple[Numbers, Numbers]:
        """The first of the most probable tokens of each row, int32, and whether all its logits are finite."""
        size = self._ranks.size
        found = self._ranks.buffer_to_read()[: num_rows * size * BEST_BYTES].reshape(num_rows, size, BEST_BYTES)
        tokens, logits = found[:, :, :4].view(np.int32)[:, :, 0], found[:, :, 4:8].view(np.float32)[:, :, 0]
        of = np.where(np.isnan(logits), -np.inf, logits).argmax(axis=1)  # ranks in the order of their tokens
        best = np.take_along_axis(tokens + self._firsts, of[:, None], axis=1)[:, 0]
        return best, (found[:, :, 8] != 0).all(axis=1)


def _publish_part(x: Array, ranks: CpuRanks) -> None:
    """Record that all ranks can read this rank's x: [rows, size, width] from the begin of the buffer on."""
    assert x.dtype == np.float32
    _publish(x, ranks, start=0, stride=ranks.size * x.row_bytes, first=ranks.rank * x.row_bytes)
    _meet(x.program, ranks)


def _publish(x: Array, ranks: CpuRanks, *, start: int, stride: int, first: int) -> PublishJob:
    job = PublishJob(
        ranks=ctypes.addressof(ranks.state),
        row_bytes=x.row_bytes,
        start=start,
        stride=stride,
        first=first,
        is_wanted=1,
        rows=x.rows,
    )
    x.program.append("publish", job, {"x": x}, plain=partial(_publish_plain, ranks=ranks, job=job), keeps=(ranks,))
    return job


def _meet(program: Program, ranks: CpuRanks) -> None:
    job = MeetJob(ranks=ctypes.addressof(ranks.state))
    program.append("meet", job, {}, plain=lambda _: ranks.meet(), keeps=(ranks,))


def _add_ranks(y: Array, ranks: CpuRanks, *, keeps: bool) -> None:
    job = AddRanksJob(ranks=ctypes.addressof(ranks.state), width=y.width, keeps=int(keeps), rows=y.rows)
    plain = partial(_add_ranks_plain, ranks=ranks, keeps=keeps)
    y.program.append("add_ranks", job, {"y": y}, plain=plain, keeps=(ranks,))


# --- the same in numpy (program.Plain) ---------------------------------------------------------------


def _publish_plain(_: StepArrays, *, x: Numbers, ranks: CpuRanks, job: PublishJob) -> None:
    if not job.is_wanted:
        return
    size = len(x) * job.stride
    if job.start + size > ranks.segment.buffer_bytes:
        ranks.fail_too_large()
    rows = ranks.buffer_to_write()[job.start : job.start + size].reshape(len(x), job.stride)
    rows[:, job.first : job.first + job.row_bytes] = np.ascontiguousarray(x).view(np.uint8)


def _add_ranks_plain(_: StepArrays, *, y: Floats, ranks: CpuRanks, keeps: bool) -> None:
    parts = ranks.buffer_to_read()[: ranks.size * y.nbytes].view(np.float32).reshape(len(y), ranks.size, -1)
    total = parts[:, 0].copy()
    for rank in range(1, ranks.size):
        total += parts[:, rank]
    y[:] = y + total if keeps else total
