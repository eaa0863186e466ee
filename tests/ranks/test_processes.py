"""Rank processes that fail in a step, end, stop or refuse: the engine reports which and why, and waits for none."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_rank import DoneCopy, HashedNow, ScriptedStart, StagedNow

from headwater.devices.rank_group import RankFailed
from headwater.ranks import orders, plan_stream, processes
from headwater.ranks.copier import RanksCopier
from headwater.ranks.errors import RankLost, RankRefused
from headwater.ranks.processes import RankProcesses, StreamFds
from headwater.ranks.runner import RanksRunner
from headwater.scheduling.plan import StepPlan

pytestmark = pytest.mark.slow  # processes
PAGES = np.array([1, 2], dtype=np.int32)


class Rank0:
    """Rank 0's runner, weights and copier, and its meetings: it misses a rank in the steps in which that fails."""

    def __init__(self) -> None:
        self.weights = self.kv_memory = self
        self.rank = 0
        self.adapters = None
        self.aborted: list[int] = []
        self.swapped: list[str] = []

    def launch(self, plan: StepPlan) -> None:
        if plan.token_ids[0] in (13, 99):
            raise RankFailed(1, "computes no more")
        if plan.token_ids[0] == 7:
            raise ValueError("rank 0 has failed")

    def stage(self, path: str, load_format: str) -> StagedNow:
        return StagedNow("" if path == "bad" else path)

    def swap(self, staged: StagedNow) -> None:
        self.swapped.append(staged.weights_id)

    def hash(self) -> HashedNow:
        return HashedNow("rank 0's own")

    def offload(self, sources: object, targets: object) -> DoneCopy:
        return DoneCopy()

    restore = offload

    def abort(self, rank: int) -> None:
        self.aborted.append(rank)

    def reset(self) -> None:
        self.aborted.clear()


class Group:
    def __init__(self, *, num_ranks: int = 3, refused: int | None = None) -> None:
        def start_of(rank: int, stream: StreamFds) -> ScriptedStart:
            return ScriptedStart(rank, stream, is_refused=rank == refused)

        self.rank0 = Rank0()
        self.processes = RankProcesses(
            command=(sys.executable, str(Path(__file__).with_name("scripted_rank.py"))),
            make_start=start_of,
            num_ranks=num_ranks,
            largest_command=1 << 16,
            inherited_fds=(),
            limit_s=20.0,  # a busy machine may keep a rank waiting
            abort=self.rank0.abort,
        )
        self.runner = RanksRunner(self.rank0, processes=self.processes, meetings=self.rank0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """Shared by the tests that no rank is lost in; the test of the stopped rank, the last, ends it."""
    found = Group()
    found.processes.wait_for_all(orders.Ready)
    yield found
    found.processes.close()


@pytest.fixture
def pair() -> Iterator[Group]:
    """A group whose only other rank may be lost."""
    found = Group(num_ranks=2)
    found.processes.wait_for_all(orders.Ready)
    yield found
    found.processes.close()


def step(token: int) -> StepPlan:
    one = np.ones(1, dtype=np.int32)
    return StepPlan(
        step_id=token,
        assignments=(),
        page_updates=(),
        slots=one,
        uses=np.ones(1, dtype=np.int64),
        num_computed=one,
        num_tokens=one,
        samples=np.ones(1, dtype=np.bool_),
        token_ids=np.array([token], dtype=np.int32),
        num_decodes=1,
        num_outputs=one,
    )


def wait_for(is_there: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_there():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_step_that_fails_on_one_rank_names_it_and_the_next_step_runs(group: Group) -> None:
    with pytest.raises(RuntimeError, match="rank 1: MemoryError: no room"):
        group.runner.launch(step(13))
    group.runner.recover()
    assert not group.rank0.aborted, "the meetings begin anew"
    group.runner.launch(step(1))
    with pytest.raises(ValueError, match="rank 0 has failed"):
        group.runner.launch(step(7))
    assert group.rank0.aborted == [0], "the other ranks do not wait for rank 0"
    group.runner.recover()
    group.runner.launch(step(1))
    group.processes.check()


def test_copies_and_new_weights_wait_for_all_ranks_and_one_refusal_refuses(group: Group) -> None:
    copy = RanksCopier(group.rank0, group.processes).offload(PAGES, PAGES)  # type: ignore[arg-type]
    assert copy.num_missing in (0, 1, 2)
    wait_for(copy.is_done)
    assert not copy.has_failed and copy.took_s == 0.5
    refused = group.runner.weights.stage("bad", "auto")
    wait_for(refused.is_ready)
    assert refused.error() == "rank 1: no such tensor", "rank 0 has read them"
    refused.abandon()
    good = group.runner.weights.stage("good", "auto")
    wait_for(good.is_ready)
    assert good.error() is None
    group.runner.weights.swap(good)
    assert group.rank0.swapped == ["id of good"]
    group.processes.check()


def test_hashes_are_of_what_all_ranks_hold(group: Group) -> None:
    """Rank 0 has the same in every round: the weights of the others decide whether the hash is that of before."""
    found = []
    for path in ("one", "one", "two"):
        staged = group.runner.weights.stage(path, "auto")
        wait_for(staged.is_ready)
        group.runner.weights.swap(staged)
        hashes = group.runner.weights.hash()
        wait_for(hashes.is_ready)
        assert hashes.error() is None
        found.append(hashes.found()["weight"])
    assert found[0] == found[1] != found[2]
    staged = group.runner.weights.stage("unreadable", "auto")
    wait_for(staged.is_ready)
    group.runner.weights.swap(staged)
    hashes = group.runner.weights.hash()
    wait_for(hashes.is_ready)
    assert hashes.error() == "rank 2: no such tensor", "the hash of a part would pass for that of the whole"
    hashes.abandon()
    group.processes.check()


def test_a_stopped_rank_is_noticed_while_nothing_runs_and_does_not_stay(group: Group) -> None:
    pids = group.processes.pids
    group.processes._limit_s = 2.5
    os.kill(pids[1], signal.SIGSTOP)
    wait_for(lambda: group.rank0.aborted)  # the thread that watches does this last
    with pytest.raises(RankLost, match="rank 2 has given no sign of life"):
        group.processes.check()
    assert group.rank0.aborted == [2], "a step that waits for it ends"
    group.processes.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class JumpingClock:
    """In the place of `time`; `ahead_s` is what the process has slept through."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.num_asked = 0

    def monotonic(self) -> float:
        self.num_asked += 1
        return time.monotonic() + self.ahead_s

    def monotonic_ns(self) -> int:
        return round(self.monotonic() * 1e9)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def test_an_engine_that_was_stopped_itself_finds_no_rank_silent(pair: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-Z, a debugger or a paused container, with its ranks: when all go on, nobody has hung meanwhile."""
    clock = JumpingClock()
    for module in (processes, plan_stream):
        monkeypatch.setattr(module, "time", clock)
    pair.processes.watch_steps(lambda rank: 0)
    pair.runner.launch(step(55))
    for jumps in range(1, 4):
        clock.ahead_s, asked = 1000.0 * jumps, clock.num_asked
        wait_for(lambda asked=asked: clock.num_asked > asked + 2)
    pair.processes.check()


def test_a_rank_that_lives_and_hangs_in_a_step_is_lost(pair: Group) -> None:
    """Rank 0 has done the step, so nothing waits for the other one, which shows life."""
    pair.processes._limit_s = 2.5
    pair.processes.watch_steps(lambda rank: 0)
    for token in range(1, 6):
        pair.runner.launch(step(token))
    time.sleep(3.5)
    pair.processes.check()  # an engine without steps is not at one
    pair.runner.launch(step(55))
    wait_for(lambda: pair.rank0.aborted)
    with pytest.raises(RankLost, match=r"rank 1 has not finished a step for \d\.\d s \(--rank-timeout\)"):
        pair.processes.check()


def test_a_rank_that_ends_in_a_step_is_lost_with_all(pair: Group) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 ended with exit code 3"):
        pair.runner.launch(step(99))
    with pytest.raises(RankLost, match="ended with exit code 3"):
        pair.runner.recover()
    with pytest.raises(RankLost):
        pair.processes.check()


def test_a_rank_that_cannot_carry_out_a_change_is_lost(pair: Group) -> None:
    """It would compute with the old weights while the others have the new ones."""
    staged = pair.runner.weights.stage("broken", "auto")
    wait_for(staged.is_ready)
    pair.runner.weights.swap(staged)
    wait_for(lambda: pair.processes.lost)
    with pytest.raises(RankLost, match=r"rank 1 failed: ValueError: does not fit"):
        pair.processes.check()


def test_a_rank_that_refuses_to_start_says_why() -> None:
    group = Group(num_ranks=2, refused=1)
    with pytest.raises(RankRefused, match="too little memory"):
        group.processes.wait_for_all(orders.Ready)
    group.processes.close()
