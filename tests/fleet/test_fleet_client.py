"""The control plane over replicas: one answer that is true, and no replica serves with what a flush was to retire."""

import asyncio
import json
from typing import Any

import msgspec
import pytest
from replicas import SimulatedFleet, SimulatedReplica, answer_with_store

from headwater.client.change_call import Outcome, Pending, Untouched
from headwater.client.errors import EngineGone, EngineOut
from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.messages.control import FlushCache, FlushResult, PauseGeneration
from headwater.messages.two_phase import Commit, Prepare
from headwater.messages.weights import UpdateWeights

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"loop_factory": VirtualLoop}


async def change(fleet: SimulatedFleet, message: Any, timeout_s: float = 5.0) -> Outcome:
    return await fleet.client.change(message, deadline_s=asyncio.get_running_loop().time() + timeout_s)


def update(path: str) -> UpdateWeights:
    return UpdateWeights(call_id=f"update-{path}", path=path, weight_version=path, timeout_s=5.0)


async def warm(fleet: SimulatedFleet, *replicas: SimulatedReplica) -> None:
    for replica in replicas:
        replica.compute()
    await fleet.until(lambda: all(replica.num_cached for replica in replicas))


async def test_a_flush_reaches_every_replica_and_says_what_each_freed() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b", ahead_s=5000.0)
    async with SimulatedFleet(a, b) as fleet:
        await warm(fleet, a, b)
        answers = await fleet.flush()
        assert sorted(answers) == [0, 1]
        assert all(isinstance(each, FlushResult) and each.freed["device"].pages > 0 for each in answers.values())
        assert (a.num_cached, b.num_cached) == (0, 0)


async def test_a_replica_that_cannot_be_reached_is_pending_and_serves_only_after_its_flush() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        await warm(fleet, a, b)
        b.is_cut = True
        answers = await fleet.flush()
        assert isinstance(answers[0], FlushResult) and isinstance(answers[1], Pending)
        assert [each.number for each in fleet.client.candidates()] == [0]
        assert b.num_cached > 0  # so it must not serve
        b.is_cut = False
        await fleet.until(lambda: fleet.client.why_out(1) is None)
        assert b.num_cached == 0
        (owed,) = [each for each in b.taken if isinstance(each, FlushCache)]
        assert owed.mode == "now"


async def test_a_silent_replica_is_fenced_at_the_deadline_and_flushes_once_it_turns() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        await warm(fleet, b)
        b.is_silent = True
        answers = await fleet.flush(timeout_s=0.1)
        assert isinstance(answers[1], Pending) and "in time" in answers[1].reason
        assert [each.number for each in fleet.client.candidates()] == [0]
        b.is_silent = False
        await fleet.until(lambda: fleet.client.why_out(1) is None)
        assert b.num_cached == 0


async def test_a_dry_run_and_a_flush_that_was_made_nowhere_leave_nothing_owed() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        await warm(fleet, a, b)
        b.is_cut = True
        answers = await fleet.flush(dry_run=True)
        assert isinstance(answers[0], FlushResult) and isinstance(answers[1], EngineOut)
        a.compute(150)
        await fleet.until(lambda: a.engine.parts.scheduler.in_flight())
        answers = await fleet.flush(mode="idle", timeout_s=0.0)
        assert answers[0].status == 400 and isinstance(answers[1], EngineOut)
        b.is_cut = False
        await fleet.until(lambda: fleet.client.why_out(1) is None)
        assert b.num_cached > 0


async def test_a_replica_that_has_ended_leaves_and_its_successor_has_a_number_of_its_own() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        await warm(fleet, b)
        b.is_dead = True
        answers = await fleet.flush()
        assert isinstance(answers[0], FlushResult) and isinstance(answers[1], Pending)
        await fleet.until(lambda: 1 not in fleet.client.replicas)
        successor = SimulatedReplica("b2")
        assert await fleet.join(successor) == 2
        answers = await fleet.flush()
        assert sorted(answers) == [0, 2] and all(isinstance(each, FlushResult) for each in answers.values())


async def test_a_replica_that_another_front_has_used_flushes_before_it_serves() -> None:
    old = SimulatedReplica("old")
    async with SimulatedFleet(old) as fleet:
        await warm(fleet, old)
    old.beat = msgspec.structs.replace(old.beat, front=fleet.client.name)
    async with SimulatedFleet(old):
        assert old.num_cached == 0


async def test_a_front_that_is_restarted_takes_over_the_state_and_the_newest_one_wins() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        early = fleet.client.take_beat(b.beat)
        await change(fleet, update("w1"))
        late = fleet.client.take_beat(a.beat)
    a.beat = msgspec.structs.replace(a.beat, front=late.front, desired=late.desired)
    b.beat = msgspec.structs.replace(b.beat, front=early.front, desired=early.desired)
    async with SimulatedFleet(b, a) as fleet:  # the one that knows less comes first
        fresh = SimulatedReplica("fresh")
        await fleet.join(fresh)
        await fleet.until(lambda: not fleet.client.engines_out)
        assert [each.engine.state.weights for each in (a, b, fresh)] == ["w1"] * 3
        assert fresh.engine.state.label == "w1"
        await change(fleet, update("w2"))
        old = json.dumps(json.loads(late.desired) | {"revision": 99})
        stray = SimulatedReplica("stray")
        stray.beat = msgspec.structs.replace(stray.beat, front=late.front, desired=old)
        await fleet.join(stray)  # an old state does not undo what this front has decided
        await fleet.until(lambda: not fleet.client.engines_out)
        assert [each.engine.state.weights for each in (a, b, fresh, stray)] == ["w2"] * 4


async def test_a_change_outlives_a_front_that_ends_before_any_replica_has_heard_of_it() -> None:
    kept: list[str] = []

    async def keep(desired: str) -> None:
        kept.append(desired)

    a = SimulatedReplica("a")
    async with SimulatedFleet(a, keep=keep) as fleet:
        before = fleet.client.take_beat(a.beat)  # the last that the replica repeats
        await change(fleet, update("w1"))
    a.beat = msgspec.structs.replace(a.beat, front=before.front, desired=before.desired)
    async with SimulatedFleet() as fleet:
        fleet.client.adopt(kept[-1])
        fresh = SimulatedReplica("fresh")
        await fleet.join(fresh)  # before the one that knows more
        assert fresh.engine.state.weights == "w1"
        await change(fleet, PauseGeneration(call_id="pause", mode="retract"))
        await fleet.join(a)
        assert a.engine.state.weights == "w1" and a.engine.state.is_paused


async def test_a_change_is_made_where_its_state_cannot_be_kept() -> None:
    async def keep(desired: str) -> None:
        raise OSError("no")

    a = SimulatedReplica("a")
    async with SimulatedFleet(a, keep=keep) as fleet:
        assert (await change(fleet, update("w1"))).is_decided


async def test_new_weights_are_put_in_place_by_all_or_by_none() -> None:
    a, b = SimulatedReplica("a", ahead_s=5000.0), SimulatedReplica("b", ahead_s=-3000.0)
    async with SimulatedFleet(a, b) as fleet:
        outcome = await change(fleet, update("w1"))
        assert outcome.is_decided and sorted(outcome.answers) == [0, 1]
        b.is_cut = True
        outcome = await change(fleet, update("w2"))
        assert not outcome.is_decided and isinstance(outcome.answers[0], Untouched)
        b.is_cut = False
        await fleet.until(lambda: fleet.client.why_out(1) is None)
        assert [each.engine.state.weights for each in (a, b)] == ["w1", "w1"]


async def test_a_replica_that_misses_the_commit_is_pending_and_fenced_until_it_has_caught_up() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        post = b.post

        async def lose_commits(body: bytes) -> tuple[int, bytes, float]:
            answer = await post(body)
            if isinstance(b.taken[-1], Prepare):
                b.is_cut = True
            return answer

        b.post = lose_commits  # type: ignore[method-assign]
        outcome = await change(fleet, update("w1"), timeout_s=0.5)
        assert outcome.is_decided and isinstance(outcome.answers[1], Pending)
        assert not any(isinstance(each, Commit) for each in b.taken)
        assert [each.number for each in fleet.client.candidates()] == [0]
        b.is_cut = False
        await fleet.until(lambda: fleet.client.why_out(1) is None)
        assert b.engine.state.weights == "w1"


async def test_a_replica_that_joins_is_brought_to_the_state_of_the_fleet() -> None:
    a = SimulatedReplica("a")
    async with SimulatedFleet(a) as fleet:
        await change(fleet, update("w1"))
        await change(fleet, PauseGeneration(call_id="pause", mode="retract"))
        b = SimulatedReplica("b")
        await fleet.join(b)
        assert b.engine.state.weights == "w1" and b.engine.state.is_paused


async def test_only_one_replica_raises_the_generation_of_a_shared_store() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b, shares_store=True) as fleet:
        for replica in (a, b):
            answer_with_store(replica)
        answers = await fleet.flush(tiers=("device", "storage"))
        sent = [[each.tiers for each in replica.taken if isinstance(each, FlushCache)] for replica in (a, b)]
        assert sent == [[("device", "storage")], [("device",)]]
        assert answers[1].still_warm == ()  # it was not asked about the store, which is cold by then


async def test_a_store_that_has_not_acknowledged_is_barred_by_every_replica() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b, shares_store=True) as fleet:
        for replica in (a, b):
            answer_with_store(replica, pending=("storage",))
        answers = await fleet.flush(tiers=("device", "storage"))
        sent = [[each.tiers for each in replica.taken if isinstance(each, FlushCache)] for replica in (a, b)]
        assert sent == [[("device", "storage")], [("device", "storage")]]
        assert answers[0].pending == ("storage",)


async def test_a_call_to_a_replica_that_left_is_an_answer() -> None:
    async with SimulatedFleet(SimulatedReplica("a")) as fleet:
        with pytest.raises(EngineGone):
            await fleet.client.call(FlushCache(call_id="x"), engine=7)


async def test_a_fleet_without_replicas_refuses_control_calls() -> None:
    async with SimulatedFleet() as fleet:
        with pytest.raises(EngineOut, match="no replica"):
            await fleet.flush()
