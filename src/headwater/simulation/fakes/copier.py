"""Copies of records between the fake runner's KV and a host tier, with seeded delays, reordering and failures."""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from headwater.cache.page_pool import PageIds
from headwater.simulation.checks.violation import demand
from headwater.simulation.fakes.canary import mix
from headwater.simulation.fakes.kv_records import TOKEN, HostRecords, Records, make_records

FakeHostPages = HostRecords
_HANG_POLLS = 300
_NOT_YET = np.uint64(0x5555)  # in canaries that have not arrived


class StepPages(Protocol):
    """Pages that steps in flight use."""

    def pages_read(self) -> set[int]: ...

    def pages_written(self) -> set[int]: ...


class FakeCopy:
    """A copy that happens all at once, when a poll finds it done. Before that, neither side may be reused.

    Its source must not change from its start on, and nothing else may write to its target. A restore is readable before
    it is done (`cache.copier.EarlyCopyHandle`). Then its target holds wrong canaries until a step waits for it.
    """

    def __init__(
        self,
        kind: str,
        *,
        source: Records,
        sources: PageIds,
        target: Records,
        targets: PageIds,
        num_polls: int,
        num_polls_unreadable: int,
        fails: bool,
        turn: int,
    ) -> None:
        self.kind = kind
        self.turn = turn  # of its start
        self.num_turns = 0  # in flight, counted by `Promises`
        self.num_turns_allowed = num_polls + 1
        self._polls_left = num_polls
        self._polls_unreadable = num_polls_unreadable
        self._polls_too_long = (num_polls_unreadable + 1) // 2  # for requests other than the one that waits for it
        self.is_begun = False  # its target has its records, possibly without the canaries
        self.has_arrived = False
        self._is_near = False
        self.has_failed = False
        self.took_s = 0.0
        self.is_finished = False
        self._source, self._sources = source, sources.astype(np.intp)  # the type of numpy's fastest lookups
        self._target, self._targets = target, targets.astype(np.intp)
        self.before = source.take(self._sources, axis=0)
        self.retired = self.before["retired"].copy()  # of the target: a flush covers copies in flight
        self._target_now = target["canary"][self._targets]  # which must be unchanged when it writes
        self._fails = fails

    def delay(self, num_turns: int) -> None:
        """Delay the end by `num_turns`."""
        self._polls_left += num_turns
        self.num_turns_allowed += num_turns

    def is_done(self) -> bool:
        if not self.is_finished:
            self._polls_left -= 1
            if self._polls_left < 0:
                self.is_finished = True
                self.has_failed = self._fails
                self._check_kept()
                self.arrive()
        return self.is_finished

    def is_readable(self, *, is_alone: bool) -> bool:
        """Whether a restore is readable; asked once a turn, after `is_done`."""
        if not self.is_begun and self.is_near(is_alone=is_alone):
            self.begin_reading()
        return self.is_begun

    def is_near(self, *, is_alone: bool) -> bool:
        """As `ranks.copier.ArrivingCopy` has it; asked once a turn."""
        if self._fails:
            return False
        self._polls_unreadable -= 1
        self._is_near |= self._polls_unreadable < (self._polls_too_long if is_alone else 0)
        return self._polls_unreadable < (self._polls_too_long if is_alone else 0)

    def begin_reading(self) -> None:
        demand(self._is_near or self.is_finished, "ranks_agree", "a rank reads a restore that may still fail on it")
        if not self.is_begun:
            self._check_kept()
            self._begin(self.before["canary"] ^ _NOT_YET)

    @property
    def missing_pages(self) -> set[int]:
        """Targets that have not arrived."""
        return set() if self.has_arrived else set(self._targets.tolist())

    @property
    def is_awaited(self) -> bool:
        """Whether a step that may read the target has to wait."""
        return self.is_begun and not self.has_arrived

    def covers(self, pages: PageIds) -> bool:
        """Whether any of `pages` is a target that has not arrived."""
        return not self.has_arrived and not set(self._targets.tolist()).isdisjoint(pages.tolist())

    def reads(self, pages: PageIds) -> bool:
        """Whether any of `pages` is a source."""
        return not set(self._sources.tolist()).isdisjoint(pages.tolist())

    def arrive(self) -> None:
        """Complete the target, though the copy may not report its end yet."""
        if self.has_arrived:
            return
        self.has_arrived = True
        canaries = self.before["canary"].copy()
        if self._fails:  # the first half has arrived, the rest is undefined
            canaries[len(canaries) // 2 :] ^= _NOT_YET
        if self.is_begun:
            self._target["canary"][self._targets] = canaries
            self._target_now = canaries
        else:
            self._begin(canaries)

    def _begin(self, canaries: npt.NDArray[np.uint64]) -> None:
        """Write the records to the target; from now on a flush covers them there."""
        self.is_begun = True
        copied = bytearray(self.before)  # numpy copies bytes several times faster than records
        arriving = np.frombuffer(copied, dtype=TOKEN).reshape(self.before.shape)
        arriving["retired"] = self.retired
        arriving["canary"] = canaries
        self._target.view(np.uint8)[self._targets] = np.frombuffer(copied, dtype=np.uint8).reshape(len(arriving), -1)
        self._target_now = canaries

    def _check_kept(self) -> None:
        same = _have_equal_canaries(self._source, self._sources, self.before["canary"])
        demand(same, "copy_source_kept", f"{self.kind}: a page was written while it was copied")
        same = _have_equal_canaries(self._target, self._targets, self._target_now)
        demand(same, "copy_target_kept", f"{self.kind}: a page was written while it was the target of a copy")


class FakeCopier:
    """`cache.copier.PageCopier` over records. It reads a source at the copy's end, so early reuse of a page shows.

    Delays and failures follow from the copied contents, so they repeat even if other copies are added or removed.
    """

    def __init__(self, kv: Records, *, num_host_pages: int, seed: int = 0) -> None:
        self.host = make_records(num_host_pages, kv.shape[1])
        self.max_polls = 0  # most turns of a copy
        self.failure_rate = 0.0
        self.hang_rate = 0.0
        self.steps: StepPages | None = None
        self.turn: Callable[[], int] = lambda: 0
        self._kv = kv
        self._seed = mix(seed + 1)
        self._num_copies: Counter[int] = Counter()  # by the first copied canary
        self._open: list[FakeCopy] = []

    @property
    def open_copies(self) -> list[FakeCopy]:
        """Copies that no poll has found done."""
        if self._open:
            self._open = [copy for copy in self._open if not copy.is_finished]
        return self._open

    def offload(self, device_pages: PageIds, host_pages: PageIds) -> FakeCopy:
        if self.steps is not None:
            is_kept = self.steps.pages_written().isdisjoint(device_pages.tolist())
            demand(is_kept, "offload_after_step", "pages are copied that a step in flight writes")
        is_again = any(copy.kind == "offload" and copy.reads(device_pages) for copy in self.open_copies)
        demand(not is_again, "copied_once", "pages are copied to the host that are on their way there")
        is_early = any(copy.kind == "restore" and copy.covers(device_pages) for copy in self.open_copies)
        demand(not is_early, "offload_after_restore", "pages are copied that have not arrived")
        return self._copy("offload", self._kv, device_pages, self.host, host_pages)

    def restore(self, host_pages: PageIds, device_pages: PageIds) -> FakeCopy:
        if self.steps is not None:
            is_unused = self.steps.pages_read().isdisjoint(device_pages.tolist())
            demand(is_unused, "restore_into_free_pages", "pages are overwritten that a step in flight reads")
        return self._copy("restore", self.host, host_pages, self._kv, device_pages)

    def wait(self) -> None:
        """Wait for all restores, as the kernels of a step with prompt tokens do."""
        for copy in self._open:
            if copy.kind == "restore" and copy.is_awaited:
                copy.arrive()

    def _copy(self, kind: str, source: Records, sources: PageIds, target: Records, targets: PageIds) -> FakeCopy:
        first = int(source["canary"][sources[0], 0])
        self._num_copies[first] += 1
        chance = mix(first ^ self._seed ^ mix(self._num_copies[first]))
        hangs = (mix(chance) & 0xFFFFFFFF) < self.hang_rate * 2**32
        num_polls = (chance & 0xFFFFFFFF) % (self.max_polls + 1) + _HANG_POLLS * hangs
        copy = FakeCopy(
            kind,
            source=source,
            sources=sources,
            target=target,
            targets=targets,
            num_polls=num_polls,
            num_polls_unreadable=mix(chance ^ 1) % (num_polls + 1),
            fails=(chance >> 32) < self.failure_rate * 2**32,
            turn=self.turn(),
        )
        self._open = [*self.open_copies, copy]
        return copy


def _have_equal_canaries(records: Records, pages: npt.NDArray[np.intp], canaries: npt.NDArray[np.uint64]) -> bool:
    return records["canary"][pages].tobytes() == canaries.tobytes()
