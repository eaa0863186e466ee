"""A rank of a group of processes on one CPU (devices.rank_group.RankGroup), which meet in shared memory."""

import ctypes
import os
import select
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.ranks.segment import RankSegment
from headwater.devices.rank_group import RankFailed

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_NAP_S = 0.0005
_NONE, _ENDED, _SILENT, _ABORTED, _TOO_LARGE = range(5)  # `enum RankFailure` of kernels/ranks/ranks.h
_NO_LIMIT_NS = 1 << 62
_WORD = (1 << 32) - 1


class RankState(ctypes.Structure):
    """`RankState` of kernels/ranks/ranks.h."""

    _fields_ = (
        ("lines", _POINTER),
        ("aborted", _POINTER),
        ("buffers", _POINTER),
        ("buffer_bytes", _INT64),
        ("rank", _INT64),
        ("size", _INT64),
        ("limit_ns", _INT64),
        ("num_meetings", _INT64),
        ("failed_rank", _INT64),
        ("failure", _INT64),
    )


class CpuRanks:
    """This process as one rank of a group.

    A rank that ends fails the meetings that miss it, and so does one that another rank waits for longer than `limit_s`
    (None: for ever). Then every step raises RankFailed, until all ranks `reset`.
    """

    def __init__(self, segment: RankSegment, *, rank: int, limit_s: float | None = None) -> None:
        if not 0 <= rank < segment.size:
            raise ValueError(f"rank must be in [0, {segment.size}), found {rank}")
        self.segment = segment
        self.rank = rank
        self.size = segment.size
        self.state = RankState(
            lines=segment.lines.ctypes.data,
            aborted=segment.aborted.ctypes.data,
            buffers=segment.buffers.ctypes.data,
            buffer_bytes=segment.buffer_bytes,
            rank=rank,
            size=segment.size,
        )
        self.limit_s = limit_s
        self._arrived: npt.NDArray[np.uint32] = segment.lines[:, :4].view(np.uint32)[:, 0]
        self._pids: npt.NDArray[np.int64] = segment.lines[:, 8:16].view(np.int64)[:, 0]
        self._pids[rank] = os.getpid()
        self._fence = threading.Lock()
        self._num_sampled = 0  # steps that rank 0 has sampled, or will have

    @property
    def limit_s(self) -> float | None:
        return None if self.state.limit_ns == _NO_LIMIT_NS else self.state.limit_ns / 1e9

    @limit_s.setter
    def limit_s(self, value: float | None) -> None:
        self.state.limit_ns = _NO_LIMIT_NS if value is None else int(value * 1e9)

    # --- failures ------------------------------------------------------------------------------------

    @property
    def is_aborted(self) -> bool:
        return bool(self.segment.aborted[0])

    def num_arrived(self, rank: int) -> int:
        """Meetings that a rank has come to since the last failure."""
        return int(self._arrived[rank])

    def abort(self, rank: int) -> None:
        """`rank` computes no more: every rank that waits fails now, and every later step. From any thread."""
        self.segment.aborted[0] = 1 + rank

    def reset(self) -> None:
        """After a failure: every rank calls this while none computes, and none goes on before all have."""
        self.state.num_meetings, self.state.failure, self._num_sampled = 0, _NONE, 0
        self._arrived[self.rank] = 0
        if self.rank == 0:
            self.segment.num_sampled[0] = self.segment.aborted[0] = 0

    def raise_failure(self) -> None:
        """RankFailed if a meeting has failed."""
        state = self.state
        if state.failure == _NONE:
            return
        reason = {
            _ENDED: "has ended",
            _SILENT: f"did not answer within {state.limit_ns / 1e9:g} s",
            _ABORTED: "computes no more",
            _TOO_LARGE: f"has a step that does not fit its shared memory of {state.buffer_bytes} bytes",
        }[state.failure]
        raise RankFailed(state.failed_rank, reason)

    # --- newest tokens -------------------------------------------------------------------------------

    @property
    def newest_tokens(self) -> npt.NDArray[np.int32]:
        """int32[slots]: rank 0 writes them when it has sampled a step, all ranks read them in the next one."""
        return self.segment.newest_tokens

    def end_step(self) -> None:
        """Rank 0 has written the newest tokens of a step; the others will wait for them in `begin_step`."""
        self._num_sampled += 1
        if self.rank == 0:
            self._release()
            self.segment.num_sampled[0] = self._num_sampled

    def begin_step(self) -> None:
        """Wait until the tokens of the step before are there."""
        self._wait(0, lambda: bool(self.segment.num_sampled[0] >= self._num_sampled))

    # --- in numpy: what kernels/ranks/ranks.c does ---------------------------------------------------

    def buffer_to_write(self) -> npt.NDArray[np.uint8]:
        """What this rank writes before the next meeting."""
        return self.segment.buffers[self.state.num_meetings & 1]

    def buffer_to_read(self) -> npt.NDArray[np.uint8]:
        """What all ranks wrote before the newest meeting. Valid until this rank comes to the next one."""
        return self.segment.buffers[(self.state.num_meetings - 1) & 1]

    def meet(self) -> None:
        """Wait for all ranks. RankFailed if one does not come."""
        self.raise_failure()
        self.state.num_meetings += 1
        meeting = self.state.num_meetings
        self._release()
        self._arrived[self.rank] = meeting & _WORD
        for peer in range(self.size):
            self._wait(peer, lambda peer=peer: (int(self._arrived[peer]) - meeting & _WORD) < 1 << 31)

    def _release(self) -> None:
        """Order the writes and reads of shared memory before and after: a lock is released, then acquired."""
        for _ in range(2):
            with self._fence:
                pass

    def _wait(self, peer: int, is_there: Callable[[], bool]) -> None:
        """Wait for `peer`. RankFailed if that is vain."""
        began_s = time.monotonic()
        while not is_there():
            if self.is_aborted:
                self._fail(int(self.segment.aborted[0]) - 1, _ABORTED)
            if (time.monotonic() - began_s) * 1e9 > self.state.limit_ns:
                self._fail(peer, _SILENT)
            if _has_ended(int(self._pids[peer])) and not is_there():
                self._fail(peer, _ENDED)
            time.sleep(_NAP_S)
        self._release()

    def fail_too_large(self) -> None:
        """This rank's numbers do not fit the buffer."""
        self._fail(self.rank, _TOO_LARGE)

    def _fail(self, rank: int, failure: int) -> None:
        self.state.failed_rank, self.state.failure = rank, failure
        self.segment.aborted[0] = 1 + rank
        self.raise_failure()


def _has_ended(pid: int) -> bool:
    """Whether a process has ended. One that has not been waited for takes signals, so its descriptor is asked."""
    if pid == 0:
        return False  # it has not begun
    try:
        if not hasattr(os, "pidfd_open"):
            os.kill(pid, 0)
            return False
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    finally:
        os.close(descriptor)
