"""The processes of ranks 1 to N - 1, as their engine sees them: it starts, commands, watches and ends them."""

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from headwater.messages.frames import FrameReader, pack_frame
from headwater.ranks import orders
from headwater.ranks.errors import RankLost, RankRefused
from headwater.ranks.plan_codec import Kind
from headwater.ranks.plan_stream import PlanStream, ring_bytes
from headwater.ranks.shared_memory import SharedMemory
from headwater.ranks.step_progress import StepProgress, StepWatch

_LOOK_S = 0.2  # between two looks at the signs of life
_MOST_PAUSE_S = 1.0  # between two looks that counts: in a longer one this process was stopped, and perhaps all
_REASON_S = 2.0  # that the end of a process, or its report of a failed step, may lag behind the step that missed it
_GRACE_S = 2.0  # for processes to end by themselves
_MOST_RECOVERY_S = 10.0
_MOST_ANSWER_S = 10.0
_R = TypeVar("_R", bound=msgspec.Struct)

log = logging.getLogger(__name__)


class StreamFds(msgspec.Struct, frozen=True):
    """What a rank process needs to read its stream; the descriptors are inherited."""

    memory_fd: int
    num_bytes: int
    wake_fd: int
    index: int
    num_readers: int


class RankProcesses:
    """Starts the processes and speaks with them. A thread reads their reports and looks at their signs of life."""

    def __init__(
        self,
        *,
        command: Sequence[str],
        make_start: Callable[[int, StreamFds], msgspec.Struct],
        num_ranks: int,
        largest_command: int,
        inherited_fds: Sequence[int],
        limit_s: float,
        abort: Callable[[int], None],
    ) -> None:
        """`make_start(rank, stream)` is what a process reads from its standard input.

        A process that gives no sign of life for `limit_s` is lost (see also `watch_steps`). `abort(rank)` is called
        then, and when one has ended: it ends the waiting of the others for `rank`.
        """
        self.num_ranks = num_ranks
        self._limit_s = limit_s
        self._abort = abort
        self.lost: RankLost | None = None
        self._is_closing = False
        self.progress = StepProgress()  # rank 0's
        self._steps: StepWatch | None = None
        self._looked_s = time.monotonic()
        self._awake_s = 0.0  # that the thread has watched
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its last sign of life, and when the thread saw it
        self._moves_of: Callable[[int], int] = lambda rank: 0
        self._reports: dict[int, deque[orders.Report]] = {rank: deque() for rank in range(1, num_ranks)}
        self._has_reports = threading.Condition(threading.RLock())
        self.on_copied: Callable[[orders.Copied], None] = lambda _: None
        self.on_near: Callable[[orders.Near], None] = lambda _: None
        self.on_staged: Callable[[int, orders.Staged], None] = lambda *_: None
        self.on_hashed: Callable[[int, orders.WeightsHashed], None] = lambda *_: None
        self.on_adapter_staged: Callable[[int, orders.AdapterStaged], None] = lambda *_: None
        self._resources = contextlib.ExitStack()
        self._processes: dict[int, subprocess.Popen] = {}
        self._thread = threading.Thread(target=self._watch, name="watch-ranks", daemon=True)
        memory = SharedMemory.create(ring_bytes(num_ranks - 1, largest_body=largest_command))
        self._resources.callback(memory.close)
        pipes = [os.pipe() for _ in range(1, num_ranks)]
        for _, write_fd in pipes:
            self._resources.callback(os.close, write_fd)
        self.stream = PlanStream(memory, [write_fd for _, write_fd in pipes], check=self.check)
        try:
            for rank, (read_fd, _) in enumerate(pipes, start=1):
                stream = StreamFds(memory.fd, memory.num_bytes, read_fd, rank - 1, num_ranks - 1)
                process = _start(command, make_start(rank, stream), fds=(memory.fd, read_fd, *inherited_fds))
                self._processes[rank] = self._resources.enter_context(process)
        except BaseException:
            self.kill()
            raise
        finally:
            for read_fd, _ in pipes:
                os.close(read_fd)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def watch_steps(self, moves_of: Callable[[int], int]) -> None:
        """From now on, a rank that does not move on in a step for `limit_s` is lost.

        Before, steps may compile kernels. `moves_of(rank)` counts what a rank has done within its steps.
        """
        self._moves_of = moves_of
        self._steps = StepWatch(limit_s=self._limit_s)

    def order(self, order: orders.Order) -> None:
        self.stream.write(Kind.ORDER, orders.encode_order(order))

    def check(self) -> None:
        """Raise RankLost if a rank is lost."""
        if self.lost is not None:
            raise self.lost

    def wait_for_all(self, kind: type[orders.Report]) -> list[orders.Report]:
        """The next report of each rank, which is of this kind. RankLost or RankRefused if one does not come."""
        found: list[orders.Report] = []
        with self._has_reports:
            for rank, reports in self._reports.items():
                self._has_reports.wait_for(lambda reports=reports: reports or self.lost is not None)
                for refusal in self._of_kind(orders.Refused):
                    raise RankRefused(refusal.message)
                if not reports:
                    self.check()
                report = reports.popleft()
                if not isinstance(report, kind):
                    raise RankLost(f"rank {rank} answered {report} and not {kind.__name__}")
                found.append(report)
        return found

    def wait_until_recovered(self, recovery_id: int) -> None:
        """Wait until every rank has left a failed step, and forget the reports about it. RankLost if one does not."""
        awaited = orders.Recovered(recovery_id=recovery_id)
        limit_s = min(self._limit_s, _MOST_RECOVERY_S)
        with self._has_reports:
            for rank, reports in self._reports.items():
                has_answered = self._has_reports.wait_for(
                    lambda reports=reports: awaited in reports or self.lost is not None, timeout=limit_s
                )
                if not has_answered:
                    self._lose(rank, f"did not leave a failed step within {limit_s:g} s")
                self.check()
            for reports in self._reports.values():
                reports.clear()

    def wait_for_weights(self, read_id: int) -> list[orders.WeightsRead]:
        """The answers of all ranks to a `ReadWeights`. RankLost if a rank is lost, TimeoutError if one is too slow."""
        found: list[orders.WeightsRead] = []
        with self._has_reports:
            for rank, reports in self._reports.items():

                def answer(reports: deque[orders.Report] = reports) -> orders.WeightsRead | None:
                    read = (it for it in reports if isinstance(it, orders.WeightsRead) and it.read_id == read_id)
                    return next(read, None)

                self._has_reports.wait_for(lambda answer=answer: answer() or self.lost is not None, _MOST_ANSWER_S)
                self.check()
                report = answer()
                if report is None:
                    raise TimeoutError(f"rank {rank} has not read its weights within {_MOST_ANSWER_S:g} s")
                reports.remove(report)
                found.append(report)
        return found

    def reason_of(self, rank: int) -> str | None:
        """Why `rank` has missed a step: how it ended, or the error that it reported; None if it stays silent."""

        def find() -> str | None:
            if self.lost is not None:
                return str(self.lost)
            failed = [it for it in self._reports.get(rank, ()) if isinstance(it, orders.StepFailed)]
            return f"rank {rank}: {failed[0].error}" if failed else None

        with self._has_reports:
            return self._has_reports.wait_for(find, timeout=_REASON_S)

    def _of_kind(self, kind: type[_R]) -> list[_R]:
        return [it for reports in self._reports.values() for it in reports if isinstance(it, kind)]

    def close(self) -> None:
        """End all processes in order, and wait for their end. Repeated calls do nothing."""
        if self._is_closing:
            return
        self._is_closing = True
        if self.lost is None:
            with contextlib.suppress(RankLost, ValueError):
                self.order(orders.Stop())
        deadline_s = time.monotonic() + (_GRACE_S if self.lost is None else 0.0)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline_s - time.monotonic(), 0.0))
        self.kill()

    def kill(self) -> None:
        """End all processes now, also stopped ones. Repeated calls do nothing."""
        self._is_closing = True
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        if self._thread.is_alive():
            self._thread.join()  # at most one look longer
        with self._resources:
            pass

    # --- the thread ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        readers = {rank: FrameReader() for rank in self._processes}
        with selectors.DefaultSelector() as selector:
            for rank, process in self._processes.items():
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while not self._is_closing:
                for key, _ in selector.select(timeout=_LOOK_S):
                    rank = key.data
                    portion = self._read(key.fd)
                    if not portion:
                        selector.unregister(key.fileobj)
                        self._lose(rank, _words_of_end(self._processes[rank]))
                    for body in readers[rank].feed(portion):
                        self._take(rank, orders.decode_report(body))
                self._count_pause()
                self._look_for_signs_of_life()
                self._look_at_steps()

    def _read(self, fd: int) -> bytes:
        try:
            return os.read(fd, 1 << 16)
        except OSError:  # closed by `kill` meanwhile
            return b""

    def _take(self, rank: int, report: orders.Report) -> None:
        match report:
            case orders.Copied():
                self.on_copied(report)
            case orders.Near():
                self.on_near(report)
            case orders.Staged():
                self.on_staged(rank, report)
            case orders.WeightsHashed():
                self.on_hashed(rank, report)
            case orders.AdapterStaged():
                self.on_adapter_staged(rank, report)
            case orders.CommandFailed():
                self._lose(rank, f"failed: {report.error}")
            case _:
                with self._has_reports:
                    self._reports[rank].append(report)
                    self._has_reports.notify_all()

    def _count_pause(self) -> None:
        """Ctrl-Z, a debugger or a paused container stops all processes: when they go on, no rank has been silent."""
        now_s = time.monotonic()
        self._awake_s += min(now_s - self._looked_s, _MOST_PAUSE_S)
        self._looked_s = now_s

    def _look_for_signs_of_life(self) -> None:
        for rank, seen_ns in enumerate(self.stream.signs_of_life(), start=1):
            if seen_ns and self._seen.get(rank, (0, 0.0))[0] != seen_ns:
                self._seen[rank] = seen_ns, self._awake_s
        for rank, (_, since_s) in self._seen.items():
            silent_s = self._awake_s - since_s
            if silent_s > self._limit_s:
                self._lose(rank, f"has given no sign of life for {silent_s:.1f} s (--rank-timeout)")

    def _look_at_steps(self) -> None:
        if self._steps is None:
            return
        num_begun = self.progress.num_begun  # first: what begins meanwhile has not ended
        positions = [self.progress.look(), *self.stream.steps()]
        found = self._steps.find(
            self._awake_s, num_begun, [(*it, self._moves_of(rank)) for rank, it in enumerate(positions)]
        )
        if found is not None:
            self._lose(*found)

    def _lose(self, rank: int, reason: str) -> None:
        if self._is_closing or self.lost is not None:
            return
        with self._has_reports:
            self.lost = RankLost(f"rank {rank} {reason}")
            if not self._of_kind(orders.Refused):
                log.error("rank %d %s", rank, reason)
            self._has_reports.notify_all()
        self._abort(rank)


def _start(command: Sequence[str], start: msgspec.Struct, *, fds: Sequence[int]) -> subprocess.Popen:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
        process_group=0,  # a terminal's Ctrl-C reaches only the server, which ends everything in order
        bufsize=0,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died immediately; its end is noticed
        process.stdin.write(pack_frame(start))
    return process


def _words_of_end(process: subprocess.Popen) -> str:
    try:
        code = process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        return "has closed its pipe"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
