"""A rank process for tests: a real stream, worker and pipe around a runner that follows a script.

A plan of token 13 raises, one of token 99 ends the process, one of token 55 hangs in rank 1. Weights at "bad" are
refused.
"""

import os
import sys
import threading
import time
from io import FileIO

import msgspec

from headwater.messages.frames import read_frame
from headwater.ranks import orders
from headwater.ranks.plan_stream import StreamReader
from headwater.ranks.processes import StreamFds
from headwater.ranks.shared_memory import SharedMemory
from headwater.ranks.worker import RankWorker, Reports
from headwater.scheduling.plan import StepPlan


class ScriptedStart(msgspec.Struct, frozen=True):
    rank: int
    stream: StreamFds
    is_refused: bool = False


class StagedNow:
    """Weights that are read at once."""

    has_changed = False

    def __init__(self, path: str) -> None:
        self.weights_id = f"id of {path}"
        self._error = "no such tensor" if path == "bad" else None

    def is_ready(self) -> bool:
        return True

    def error(self) -> str | None:
        return self._error

    def abandon(self) -> None:
        pass


class HashedNow(StagedNow):
    """Hashes of the weights in place."""

    def found(self) -> dict[str, str]:
        return {"weight": self.weights_id}


class DoneCopy:
    has_failed, took_s = False, 0.5

    def is_done(self) -> bool:
        return True


class ScriptedRunner:
    """Runner, weights, copier and meetings at once."""

    def __init__(self, rank: int) -> None:
        self.adapters = None
        self.rank = rank
        self.weights = self.kv_memory = self
        self.in_place = ""

    def launch(self, plan: StepPlan) -> None:
        if plan.token_ids[0] == 13:
            raise MemoryError("no room")
        if plan.token_ids[0] == 99:
            os._exit(3)
        if plan.token_ids[0] == 55 and self.rank == 1:
            threading.Event().wait()

    def stage(self, path: str, load_format: str) -> StagedNow:
        return StagedNow(path)

    def swap(self, staged: StagedNow) -> None:
        if staged.weights_id == "id of broken":
            raise ValueError("does not fit")
        self.in_place = staged.weights_id

    def hash(self) -> HashedNow:
        """Of what this rank holds; rank 2 cannot hash the weights "unreadable"."""
        return HashedNow("bad" if self.rank == 2 and self.in_place.endswith("unreadable") else self.in_place)

    def offload(self, sources: object, targets: object) -> DoneCopy:
        return DoneCopy()

    restore = offload

    def abort(self, rank: int) -> None:
        pass

    def reset(self) -> None:
        pass


def main() -> None:
    start = msgspec.msgpack.decode(read_frame(FileIO(0, closefd=False)), type=ScriptedStart)
    reports = Reports(FileIO(os.dup(1), "w").write)
    if start.is_refused:
        reports.send(orders.Refused(message="too little memory"))
        sys.exit(2)
    stream = start.stream
    memory = SharedMemory(stream.memory_fd, stream.num_bytes)
    reader = StreamReader(memory, stream.wake_fd, index=stream.index, num_readers=stream.num_readers)

    runner = ScriptedRunner(start.rank)
    worker = RankWorker(runner, meetings=runner, copier=runner, reports=reports)  # type: ignore[arg-type]

    def show_life() -> None:
        while True:
            reader.show_life(worker.progress.look())
            time.sleep(0.05)

    threading.Thread(target=show_life, daemon=True).start()
    reports.send(orders.Ready())
    worker.run(reader)


if __name__ == "__main__":
    main()
