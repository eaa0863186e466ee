"""Messages between front and replicas that get lost: a call is repeated inside its deadline, and made once."""

import asyncio
from typing import Any

import msgspec
import pytest
from replicas import SimulatedFleet, SimulatedReplica, answer_with_store

from headwater.client.change_call import Pending
from headwater.fleet import client
from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.messages.control import FlushCache, FlushResult
from headwater.messages.two_phase import Commit, Prepare
from headwater.messages.weights import UpdateWeights

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.mark.parametrize("lost", ["message", "answer"])
async def test_a_flush_that_got_lost_is_repeated_inside_its_deadline(lost: str) -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        b.losing = [(FlushCache, lost)]
        answers = await fleet.flush(timeout_s=2.0)
        assert all(isinstance(each, FlushResult) and each.success for each in answers.values())
        assert sum(isinstance(each, FlushCache) for each in b.made) == 1


async def test_a_change_whose_messages_got_lost_is_made_once_by_all() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        b.losing = [(Prepare, "message"), (Prepare, "answer"), (Commit, "answer"), (Commit, "message")]
        change = UpdateWeights(call_id="u", path="w1", timeout_s=2.0)
        outcome = await fleet.client.change(change, deadline_s=asyncio.get_running_loop().time() + 2.0)
        assert outcome.is_decided and not any(isinstance(each, Pending) for each in outcome.answers.values())
        assert b.engine.state.weights == "w1" and not fleet.client.engines_out


async def test_messages_to_a_replica_that_hangs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        b.is_silent = True
        monkeypatch.setattr(client, "_UNDATED_S", 0.2)
        await fleet.flush(timeout_s=0.1)
        sending = fleet.client._sending
        await fleet.until(lambda: len([task for task in sending if not task.done()]) <= 1)  # its state is asked for


async def test_a_silent_replica_does_not_keep_the_others_from_flushing_a_shared_store() -> None:
    replicas = [SimulatedReplica(name) for name in "abcd"]
    async with SimulatedFleet(*replicas, shares_store=True) as fleet:
        replicas[0].is_silent = True
        for replica in replicas[1:]:
            answer_with_store(replica)
        began_s = asyncio.get_running_loop().time()
        answers = await fleet.flush(timeout_s=0.5, tiers=("device", "host", "storage"))
        assert isinstance(answers[0], Pending)
        assert all(isinstance(answers[number], FlushResult) for number in (1, 2, 3))
        assert asyncio.get_running_loop().time() - began_s < 5.0  # one deadline, on a busy machine as well


async def test_one_deadline_holds_however_many_replicas_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = [SimulatedReplica(f"r{number}") for number in range(8)]
    async with SimulatedFleet(*replicas, shares_store=True) as fleet:
        for replica in replicas:
            replica.is_silent = True
        began_s = asyncio.get_running_loop().time()
        answers = await fleet.flush(timeout_s=0.1, tiers=("device", "host", "storage"))
        assert all(isinstance(each, TimeoutError) for each in answers.values())
        assert asyncio.get_running_loop().time() - began_s < 4.0  # 0.9 s for each of them would be 7 s


async def test_a_replica_that_ended_during_a_flush_is_not_pending() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        b.is_silent = True
        asking = asyncio.create_task(fleet.flush(timeout_s=5.0))
        await fleet.until(lambda: any(isinstance(each, FlushCache) for each in b.taken))
        fleet.client.take_beat(msgspec.structs.replace(b.beat, has_ended=True))
        answers = await asking
        assert [type(each) for each in answers.values()] == [FlushResult]


async def test_a_beat_that_comes_after_the_end_of_its_replica_makes_no_other_one() -> None:
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:
        fleet.client.take_beat(msgspec.structs.replace(b.beat, has_ended=True))
        fleet.client.take_beat(b.beat)
        assert list(fleet.client.replicas) == [0]


async def test_an_answer_that_is_none_counts_as_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may listen at the address of a replica that has ended."""
    a, b = SimulatedReplica("a"), SimulatedReplica("b")
    async with SimulatedFleet(a, b) as fleet:

        async def nonsense(body: bytes) -> tuple[int, bytes, float]:
            return 200, b"<html>", 0.0

        b.post = nonsense  # type: ignore[method-assign]
        await fleet.until(lambda: 1 in fleet.client.engines_out)
        answers: dict[int, Any] = await fleet.flush(timeout_s=0.5)
        assert isinstance(answers[1], Pending)
