"""Ranks on GPUs: how they find each other, and how a failure ends them.

A rank that waits in NCCL for another one does not return, and a step in a CUDA graph cannot be left. So where a rank
on a CPU leaves a failed step, its process ends here, and so does the engine's, which is started again with all ranks.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from headwater.devices.cuda.ranks.group import CudaRanks
from headwater.launch.child_process import EXIT_CRASHED

_GRACE_S = 2.0  # for rank 0 to find by itself that another rank is lost
_CLOSE_S = 5.0

log = logging.getLogger(__name__)


def device_of(card: int) -> torch.device:
    return torch.device("cuda", card)


def join_group(*, rank: int, size: int, first_card: int, rendezvous: str) -> CudaRanks:
    """Wait for all ranks of the engine."""
    card = first_card + rank
    log.info("rank %d of %d computes on GPU %d", rank, size, card)
    return CudaRanks(rank=rank, size=size, rendezvous=Path(rendezvous), torch_device=device_of(card))


def close_group(group: CudaRanks) -> None:
    """Leave the group. NCCL may hang where other ranks are lost, so this waits for a few seconds only."""
    thread = threading.Thread(target=group.close, name="close-ranks", daemon=True)
    thread.start()
    thread.join(_CLOSE_S)


class RankMeetings:
    """`worker.Meetings` of ranks 1 and up: a step that fails ends the process, which the engine notices."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def abort(self, rank: int) -> None:
        os._exit(EXIT_CRASHED)

    def reset(self) -> None:
        raise RuntimeError("ranks on GPUs do not leave a failed step")


class EngineMeetings:
    """`worker.Meetings` of rank 0: a failure ends the engine's process after a moment, since its thread may hang."""

    rank = 0

    def __init__(self, *, end: Callable[[int], None], grace_s: float = _GRACE_S) -> None:
        """`end` is called in a thread, with the rank that failed; it does not return."""
        self._end = end
        self._grace_s = grace_s
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._is_closed = False
        self.may_hang = True  # whether rank 0 may wait for another rank on its card: not while it loads

    def abort(self, rank: int) -> None:
        """From any thread."""
        with self._lock:
            if self._timer is not None or self._is_closed or not self.may_hang:
                return
            log.critical("rank %d computes no more: the engine ends", rank)
            self._timer = threading.Timer(self._grace_s, self._end, (rank,))
            self._timer.daemon = True
            self._timer.start()

    def reset(self) -> None:
        raise RuntimeError("ranks on GPUs do not leave a failed step: the engine ends")

    def close(self) -> bool:
        """The engine ends. Whether it does so in order; else its process will be ended all the same: NCCL may hang."""
        with self._lock:
            self._is_closed = True
            return self._timer is None


def end_hard(pids: Sequence[int], clean: Callable[[], None]) -> None:
    """End the processes and this one, without waiting for anything that may hang. `clean` reports and removes files."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # the rank that was lost may have been waited for
            os.kill(pid, signal.SIGKILL)
    clean()
    logging.shutdown()
    time.sleep(0.01)  # what another thread is writing
    os._exit(EXIT_CRASHED)
