"""A replica that leaves a fleet: what it has stored is found by the others, and a flush reaches it there."""

import asyncio
from typing import Any

import msgspec
import pytest
from replicas import SimulatedFleet, SimulatedReplica

from headwater.client.link import new_call_id
from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.messages.generation import OutputMeta
from headwater.messages.state import EngineState, GetState
from headwater.simulation.fleet.engine import PAGE_SIZE
from headwater.storage.backend import StorageBackend
from headwater.storage.memory import MemoryBackend

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(5, 105))
NUM_WHOLE = len(PROMPT) - PAGE_SIZE  # one token at least is always computed


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"loop_factory": VirtualLoop}


def with_store(name: str, store: StorageBackend) -> SimulatedReplica:
    replica = SimulatedReplica(name)
    replica.engine.parts.storage.attach_backend(store)
    return replica


async def answered(fleet: SimulatedFleet, replica: SimulatedReplica) -> OutputMeta:
    """The facts of a request for `PROMPT`."""
    replica.outputs.clear()
    replica.compute(prompt=PROMPT)
    await fleet.until(lambda: any(output.finish for output in replica.outputs))
    metas = [output.meta for output in replica.outputs if output.meta is not None]
    return metas[-1]


async def leave(fleet: SimulatedFleet, replica: SimulatedReplica) -> None:
    """As `ReplicaDeployment` does: it takes nothing new, waits until its engine is idle, copies included, and ends."""
    number = fleet.number(replica)
    fleet.client.take_beat(msgspec.structs.replace(replica.beat, is_draining=True))
    assert number not in [each.number for each in fleet.client.candidates()]
    while (await state_of(fleet, number)).blockers:
        await asyncio.sleep(0.002)
    replica.is_dead = True
    fleet.client.take_beat(msgspec.structs.replace(replica.beat, has_ended=True))
    assert number not in fleet.client.replicas


async def state_of(fleet: SimulatedFleet, number: int) -> EngineState:
    return await fleet.client.call(GetState(call_id=new_call_id()), engine=number)


async def test_pages_of_a_replica_that_left_are_found_by_another() -> None:
    store = MemoryBackend(capacity_bytes=1 << 20)
    a, b = with_store("a", store), with_store("b", store)
    async with SimulatedFleet(a, b) as fleet:
        a.compute(prompt=PROMPT)  # which it still does when it begins to leave
        await leave(fleet, a)
        assert (await answered(fleet, b)).cached_storage == NUM_WHOLE


async def test_a_flush_reaches_the_stored_pages_of_a_replica_that_left() -> None:
    store = MemoryBackend(capacity_bytes=1 << 20)
    a, b = with_store("a", store), with_store("b", store)
    async with SimulatedFleet(a, b, shares_store=True) as fleet:
        a.compute(prompt=PROMPT)
        await leave(fleet, a)
        answers = await fleet.flush(timeout_s=5.0, tiers=("device", "host", "storage"))
        assert [each.status for each in answers.values()] == [200]
        assert (await answered(fleet, b)).cached_storage == 0


async def test_a_beat_that_comes_late_does_not_end_the_draining_of_a_replica() -> None:
    """It would get requests again, and end with them."""
    replica = SimulatedReplica("a")
    async with SimulatedFleet(replica, SimulatedReplica("b")) as fleet:
        number, early = fleet.number(replica), replica.beat
        fleet.client.take_beat(msgspec.structs.replace(early, is_draining=True))
        fleet.client.take_beat(early)
        assert number not in [each.number for each in fleet.client.candidates()]
        assert not fleet.client.stays(number)
