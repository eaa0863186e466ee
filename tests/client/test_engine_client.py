"""The client against a scripted engine: every request and call gets an answer, and nothing is left behind."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from headwater.client import link
from headwater.client.engine_client import (
    CallFailed,
    EngineClient,
    EngineGone,
    RidInUse,
    ShuttingDown,
    new_call_id,
)
from headwater.messages.base import pack_ids
from headwater.messages.control import CancelOperation, Done, Failed, FlushCache
from headwater.messages.generation import Abort, Finish, Generate, SamplingParams
from headwater.messages.state import Hello, Ping
from scripted_engine import Script, ScriptedEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedEngine]:
    with ScriptedEngine(f"ipc://{tmp_path}/engine.sock") as engine:
        yield engine


@asynccontextmanager
async def connected(*endpoints: str) -> AsyncIterator[EngineClient]:
    client = EngineClient(endpoints)
    await client.start()
    try:
        await client.wait_ready(timeout_s=20)
        yield client
    finally:
        await client.close()


def request(rid: str, *, max_new_tokens: int = 4) -> Generate:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return Generate(rid=rid, prompt_ids=pack_ids([7, 8, 9]), sampling=sampling)


async def until(condition, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_generation_brings_its_tokens_in_order_and_ends(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        outputs = [output async for output in client.generate(request("a", max_new_tokens=5))]
        assert [token for output in outputs for token in output.token_ids] == [7, 8, 9, 7, 8]
        assert outputs[-1].finish == Finish(type="length")
        assert client.num_running == 0


async def test_many_streams_at_once_do_not_mix(engine: ScriptedEngine) -> None:
    async def run(client: EngineClient, number: int) -> list[int]:
        prompt = pack_ids([number + 1])
        generation = client.generate(
            Generate(rid=f"r{number}", prompt_ids=prompt, sampling=SamplingParams(max_new_tokens=20))
        )
        return [token async for output in generation for token in output.token_ids]

    async with connected(engine.endpoint) as client:
        answers = await asyncio.gather(*(run(client, number) for number in range(300)))
        assert answers == [[number + 1] * 20 for number in range(300)]
        assert client.num_running == 0


async def test_requests_together_come_in_one_message_and_in_order(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        with client.together():
            generations = [client.generate(request(rid)) for rid in ("a", "b", "c")]
        for generation in generations:
            assert [output async for output in generation]
        with client.together():
            pass
        with client.together():
            alone = client.generate(request("d"))
        assert [output async for output in alone]
    assert engine.batch_sizes == [3]
    assert [message.rid for message in engine.of_type(Generate)] == ["a", "b", "c", "d"]


async def test_a_request_left_before_it_was_sent_is_sent_before_its_abort(engine: ScriptedEngine) -> None:
    """An abort that came first would name nothing, and the request would run for nobody."""
    async with connected(engine.endpoint) as client:
        with client.together():
            leaves = client.generate(request("a", max_new_tokens=9999))
            leaves.close()
            stays = client.generate(request("b"))
        assert [output async for output in stays]
        await until(lambda: engine.num_running == 0 and client.num_running == 0)
    order = [(type(m), m.rid) for m in engine.received if isinstance(m, Generate | Abort)]
    assert order == [(Generate, "a"), (Abort, "a"), (Generate, "b")]


async def test_a_very_large_batch_is_several_messages(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides hold a message in memory, whatever the size of a batch."""
    monkeypatch.setattr(link, "_MAX_HELD_BYTES", 4 * 8)
    prompt = pack_ids([1, 2, 3, 4])
    async with connected(engine.endpoint) as client:
        with client.together():
            generations = [
                client.generate(Generate(rid=f"r{n}", prompt_ids=prompt, sampling=SamplingParams(max_new_tokens=1)))
                for n in range(6)
            ]
        for generation in generations:
            assert [output async for output in generation]
    assert engine.batch_sizes == [2, 2, 2]


async def test_leaving_a_generation_early_aborts_exactly_it(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        stays, leaves = (
            client.generate(request("a1", max_new_tokens=9999)),
            client.generate(request("a", max_new_tokens=9999)),
        )
        await anext(leaves)
        leaves.close()
        assert [(a.rid, a.match) for a in engine.wait_for(Abort)] == [("a", "exact")]
        await until(lambda: client.num_running == 1)
        assert (await anext(stays)).token_ids
        stays.close()
        await until(lambda: engine.num_running == 0 and client.num_running == 0)


async def test_closing_a_finished_generation_sends_no_abort(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        generation = client.generate(request("a"))
        assert [output async for output in generation]
        generation.close()
        generation.close()
        await client.call(Ping(call_id=new_call_id()))
        assert engine.of_type(Abort) == []


async def test_late_outputs_of_an_aborted_request_do_not_reach_its_successor(engine: ScriptedEngine) -> None:
    """A client that retries under the same rid must not be ended by the old request's last output."""
    async with connected(engine.endpoint) as client:
        first = client.generate(request("a", max_new_tokens=9999))
        await anext(first)
        first.close()
        second = client.generate(request("a", max_new_tokens=5))  # the abort is still under way
        tokens = [token async for output in second for token in output.token_ids]
        assert tokens == [7, 8, 9, 7, 8]


async def test_a_rid_in_use_is_refused(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        generation = client.generate(request("a", max_new_tokens=9999))
        with pytest.raises(RidInUse, match="rid 'a' is already in use"):
            client.generate(request("a"))
        generation.close()


async def test_engine_gone_fails_everything_at_once_and_refuses_what_comes(engine: ScriptedEngine) -> None:
    engine.script.flush = lambda _: None
    async with connected(engine.endpoint) as client:
        generation = client.generate(request("a", max_new_tokens=9999))
        await anext(generation)
        flush = asyncio.ensure_future(client.call(FlushCache(call_id=new_call_id(), timeout_s=60)))
        await asyncio.sleep(0.02)
        client.engine_gone(0, "killed")
        with pytest.raises(EngineGone, match="engine 0 is gone: killed"):
            async for _ in generation:
                pass
        with pytest.raises(EngineGone):
            await asyncio.wait_for(flush, 20)
        with pytest.raises(EngineGone):
            client.generate(request("b"))
        with pytest.raises(EngineGone):
            await client.call(Ping(call_id=new_call_id()))
        with pytest.raises(EngineGone):
            await client.wait_ready(timeout_s=1)
        assert "killed" in client.engines_out[0] and not client.can_serve
        assert client.num_running == 0


async def test_an_engine_that_is_back_serves_again(engine: ScriptedEngine, tmp_path: Path) -> None:
    async with connected(engine.endpoint) as client:
        client.engine_gone(0, "killed")
        with ScriptedEngine(f"ipc://{tmp_path}/second.sock") as second:
            client.engine_back(0, second.endpoint)
            await client.wait_ready(timeout_s=20)
            await until(lambda: client.can_serve)  # it has been found to be in the desired state
            assert [output async for output in client.generate(request("a"))]
            client.engine_gone(0, "end of the test")


async def test_an_engine_that_binds_late_is_waited_for(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/late.sock"
    client = EngineClient([endpoint])
    await client.start()
    try:
        with pytest.raises(TimeoutError):
            await client.wait_ready(timeout_s=0.05)
        assert client.engines_out and not client.can_serve
        with ScriptedEngine(endpoint) as engine:
            (ready,) = await client.wait_ready(timeout_s=20)
            assert ready.vocab_size == engine.ready.vocab_size
            assert len(engine.of_type(Hello)) == 1
            assert client.can_serve and not client.engines_out
    finally:
        await client.close()


async def test_a_refused_call_raises_what_the_engine_said(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        generation = client.generate(request("a", max_new_tokens=9999))
        await anext(generation)
        with pytest.raises(CallFailed) as caught:
            await client.call(FlushCache(call_id=new_call_id()))
        assert caught.value.failed.status == 400
        assert caught.value.failed.blockers == {"running": 1}
        generation.close()


async def test_a_request_refused_by_a_failed_answer_ends(engine: ScriptedEngine) -> None:
    """An engine may refuse a request as it refuses a call; the request must not wait for ever."""
    engine.script.is_stalled = True
    async with connected(engine.endpoint) as client:
        generation = client.generate(request("a"))
        link = client._links[0]
        link._answer(Failed(call_id="a", status=429, message="full"))
        with pytest.raises(CallFailed, match="full"):
            await generation.take()
        assert client.num_running == 0


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_giving_up_on_a_flush_cancels_it_in_the_engine(engine: ScriptedEngine, how: str) -> None:
    engine.script.flush = lambda _: None
    async with connected(engine.endpoint) as client:
        message = FlushCache(call_id=new_call_id(), timeout_s=60)
        if how == "timeout":
            with pytest.raises(TimeoutError):
                await client.call(message, timeout_s=0.05)
        else:
            task = asyncio.ensure_future(client.call(message))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        (cancel,) = engine.wait_for(CancelOperation)
        assert cancel.started_by_call == message.call_id
        assert client._links[0]._calls == {}


async def test_a_silent_engine_is_a_timeout_and_leaves_no_entry(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        engine.script.is_silent = True
        with pytest.raises(TimeoutError):
            await client.call(Ping(call_id=new_call_id()), timeout_s=0.05)
        assert client._links[0]._calls == {}
        assert engine.of_type(CancelOperation) == []


async def test_an_answer_given_at_the_deadline_is_waited_for(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine says then what kept it, which a timeout of the caller's own would not."""
    monkeypatch.setattr(link, "ANSWER_GRACE_S", 20.0)
    async with connected(engine.endpoint) as client:
        engine.script.is_silent = True
        message = Ping(call_id=new_call_id())
        call = asyncio.ensure_future(client.call(message, timeout_s=0.01))
        await asyncio.sleep(0.1)
        client._links[0]._answer(Done(call_id=message.call_id))
        assert isinstance(await call, Done)


async def test_shutdown_refuses_new_work_then_ends_what_runs(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        generation = client.generate(request("a", max_new_tokens=9999))
        client.refuse_new("going down")
        with pytest.raises(ShuttingDown):
            client.generate(request("b"))
        assert (await anext(generation)).token_ids
        client.refuse_all("going down")
        with pytest.raises(ShuttingDown):
            async for _ in generation:
                pass


async def test_requests_go_to_the_least_loaded_engine_and_calls_to_all(tmp_path: Path) -> None:
    script = Script(is_stalled=True)
    paths = [f"ipc://{tmp_path}/{index}.sock" for index in range(2)]
    with ScriptedEngine(paths[0], script=script) as a, ScriptedEngine(paths[1], script=script) as b:
        async with connected(*paths) as client:
            generations = [client.generate(request(f"r{number}")) for number in range(6)]
            await until(lambda: a.num_running == b.num_running == 3)
            with pytest.raises(RidInUse):
                client.generate(request("r4"))
            client.engine_gone(1, "killed")
            answers = await client.call_all(Ping(call_id=new_call_id()), timeout_s=20)
            assert [type(answer).__name__ for answer in answers] == ["Done", "EngineGone"]
            generations.append(client.generate(request("new")))
            await until(lambda: a.num_running == 4)
            for generation in generations:
                generation.close()


async def test_a_slow_consumer_gets_several_steps_in_one_take(engine: ScriptedEngine) -> None:
    async with connected(engine.endpoint) as client:
        generation = client.generate(request("a", max_new_tokens=50))
        await until(lambda: generation.has_ended)
        outputs = await generation.take()
        assert len(outputs) == 50
        assert await generation.take() == []


async def test_answers_that_came_while_the_loop_was_busy_are_all_read(engine: ScriptedEngine) -> None:
    """The socket signals arrivals once, and the link takes a bounded number of them at a time."""
    num_pings = 3 * link._READ_AT_ONCE
    answered: list[str] = []

    def take(_index: int, answer: Done) -> None:
        answered.append(answer.call_id)
        if len(answered) == 1:
            raise RuntimeError("a bug in what handles an answer")

    one = link.EngineLink(0, on_answer=take)
    with zmq.Context() as context:
        one.open(engine.endpoint, context)
        try:
            await one.wait_ready()
            call_ids = [new_call_id() for _ in range(num_pings)]
            for call_id in call_ids:
                one.post(Ping(call_id=call_id))
            engine.wait_for(Ping, count=num_pings)  # without the event loop
            await until(lambda: len(answered) == num_pings)
            assert answered == call_ids
            assert isinstance(await one.call(Ping(call_id=new_call_id()), timeout_s=20), Done)
        finally:
            one.fail(EngineGone(0, "the test has ended"))
