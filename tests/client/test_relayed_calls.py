"""A call of a fleet that comes twice: answered twice, made once."""

import asyncio
from typing import Any

import pytest

from headwater.client import relayed_calls
from headwater.client.relayed_calls import MAX_KEPT, RelayedCalls
from headwater.messages.base import Call
from headwater.messages.control import CancelOperation, Done, FlushCache, PauseGeneration
from headwater.messages.state import GetState
from headwater.messages.two_phase import Commit, InStep, Prepare

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    def __init__(self) -> None:
        self.made: list[str] = []
        self.num_cancelled = 0
        self.may_answer = asyncio.Event()

    async def relay(self, message: Any) -> Any:
        self.made.append(message.call_id)
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return Done(call_id=message.call_id)


@pytest.mark.parametrize(
    "call",
    [
        FlushCache(call_id="f"),
        Prepare(call_id="f", change=PauseGeneration(call_id="g", mode="retract")),
        Commit(call_id="f", prepared="g"),
        InStep(call_id="f"),
        CancelOperation(call_id="f", started_by_call="g"),
    ],
    ids=lambda call: type(call).__name__,
)
async def test_a_call_that_comes_again_meanwhile_or_later_is_made_once(call: Call) -> None:
    engine = Engine()
    calls = RelayedCalls(engine.relay)
    asked = [asyncio.create_task(calls.answer(call)) for _ in range(2)]
    await asyncio.sleep(0)
    engine.may_answer.set()
    answers = [*await asyncio.gather(*asked), await calls.answer(call)]
    assert [each.call_id for each in answers] == ["f"] * 3 and engine.made == ["f"]


async def test_what_changes_nothing_is_asked_anew() -> None:
    engine = Engine()
    engine.may_answer.set()
    calls = RelayedCalls(engine.relay)
    for _ in range(2):
        await calls.answer(GetState(call_id="g"))
    assert engine.made == ["g", "g"] and len(calls) == 0


async def test_a_call_without_a_caller_is_cancelled_unless_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed_calls, "REPEAT_S", 0.05)
    engine = Engine()
    calls = RelayedCalls(engine.relay)
    for _ in range(2):
        asked = asyncio.create_task(calls.answer(FlushCache(call_id="f")))
        await asyncio.sleep(0.01)
        asked.cancel()
    again = asyncio.create_task(calls.answer(FlushCache(call_id="f")))
    await asyncio.sleep(0.1)
    assert engine.num_cancelled == 0
    again.cancel()
    async with asyncio.timeout(10):
        while not engine.num_cancelled or len(calls):
            await asyncio.sleep(0.01)
    assert engine.made == ["f"]


async def test_few_answers_are_kept() -> None:
    engine = Engine()
    engine.may_answer.set()
    calls = RelayedCalls(engine.relay)
    for number in range(MAX_KEPT + 20):
        await calls.answer(FlushCache(call_id=str(number)))
    assert len(calls) <= MAX_KEPT
    await calls.answer(FlushCache(call_id=str(MAX_KEPT + 19)))
    assert len(engine.made) == MAX_KEPT + 20  # the newest are there
