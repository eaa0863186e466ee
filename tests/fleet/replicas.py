"""Replicas for tests: real engine loops on fake models, reached through a network that can be cut."""

import asyncio
from typing import Any

import msgspec

from headwater.cache.namespace import Tier
from headwater.cache.page_pool import Owner
from headwater.client.relayed_calls import RelayedCalls
from headwater.fleet.client import FleetClient
from headwater.fleet.replica import Beat
from headwater.messages.base import pack_ids
from headwater.messages.control import FlushCache, FlushResult
from headwater.messages.generation import Generate, Output, Outputs, SamplingParams
from headwater.messages.two_phase import answered_under
from headwater.messages.wire import decode_to_engine, encode
from headwater.simulation.fakes.memory import FakeWeights
from headwater.simulation.fleet.engine import FleetEngine

PROMPT = tuple(range(5, 25))


class LoopClock:
    """A host's clock: it starts anywhere and runs as the others do."""

    def __init__(self, ahead_s: float) -> None:
        self.ahead_s = ahead_s

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead_s


class SimulatedReplica:
    """One engine and its way to the front. `cut`: nothing arrives; `silent`: it arrives, and is not read."""

    def __init__(self, name: str, *, ahead_s: float = 0.0, weights: FakeWeights | None = None) -> None:
        self.clock = LoopClock(ahead_s)
        self.engine = FleetEngine(self.clock, weights=weights)
        self.beat = Beat(name=name, url=f"http://{name}", admin_key="key")
        self.is_cut = self.is_silent = self.is_dead = False
        self.taken: list[Any] = []  # messages
        self.outputs: list[Output] = []
        self.losing: list[tuple[type, str]] = []  # kinds of messages that get lost once: the "message" or its "answer"
        self.made: list[Any] = []  # messages that reached the engine
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._relayed = RelayedCalls(self._relay)

    async def post(self, body: bytes) -> tuple[int, bytes, float]:
        if self.is_cut or self.is_dead:
            raise ConnectionRefusedError("refused")
        message = decode_to_engine(body)
        self.taken.append(message)
        lost = next((each for each in self.losing if isinstance(message, each[0])), (None, ""))
        if lost[1]:
            self.losing.remove(lost)
        if lost[1] == "message":
            await asyncio.Event().wait()
        answer = await self._relayed.answer(message)
        if lost[1] == "answer":
            await asyncio.Event().wait()
        return 200, encode(answer), self.clock.now()

    async def _relay(self, message: Any) -> Any:
        future = self._answers[answered_under(message)] = asyncio.get_running_loop().create_future()
        self.made.append(message)
        self.engine.send(message)
        return await future

    async def run(self) -> None:
        while True:
            if not self.is_silent and not self.is_dead:
                self.engine.turn()
                for answer in self.engine.take():
                    if isinstance(answer, Outputs):
                        self.outputs += answer.items
                    future = self._answers.pop(getattr(answer, "call_id", None), None)
                    if future is not None and not future.done():
                        future.set_result(answer)
            await asyncio.sleep(0.002)

    def compute(self, num_tokens: int = 1, *, prompt: tuple[int, ...] = PROMPT) -> None:
        """A request that leaves pages in the cache."""
        sampling = SamplingParams(max_new_tokens=num_tokens)
        self.engine.send(Generate(rid=f"{self.beat.name}-{num_tokens}", prompt_ids=pack_ids(prompt), sampling=sampling))

    @property
    def num_cached(self) -> int:
        return self.engine.parts.scheduler.cache.tier_pages[Tier.DEVICE].pool.count(Owner.TREE)


class SimulatedFleet:
    """A front's client and its replicas; an async context manager."""

    def __init__(self, *replicas: SimulatedReplica, **options: Any) -> None:
        self.replicas = {replica.beat.name: replica for replica in replicas}
        self.options = options
        self._running: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> "SimulatedFleet":
        self.client = self.make_client()
        for replica in self.replicas.values():
            await self.join(replica)
        return self

    def make_client(self) -> FleetClient:
        return FleetClient(self.post, is_dead=self.is_dead, started_with=("w0", "auto"), **self.options)

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def join(self, replica: SimulatedReplica) -> int:
        """Returns its number when it serves."""
        self.replicas[replica.beat.name] = replica
        self._running.setdefault(replica.beat.name, asyncio.create_task(replica.run()))
        self.client.take_beat(replica.beat)
        number = self.number(replica)
        await self.until(lambda: self.client.why_out(number) is None)
        return number

    def number(self, replica: SimulatedReplica) -> int:
        return next(n for n, each in self.client.replicas.items() if each.beat.name == replica.beat.name)

    async def until(self, holds: Any) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.01)

    async def flush(self, *, timeout_s: float = 0.5, **options: Any) -> dict[int, Any]:
        now_s = asyncio.get_running_loop().time()
        message = FlushCache(call_id=f"flush-{now_s}", timeout_s=timeout_s, **{"mode": "now", **options})
        deadline_s = now_s + timeout_s
        answers = await self.client.call_all_by(message, deadline_s=deadline_s, answer_by_s=deadline_s)
        return dict(zip(answers.engines, answers, strict=True))

    async def post(self, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, float]:
        name = url.removeprefix("http://").partition("/")[0]
        assert headers["authorization"] == "Bearer key"
        return await self.replicas[name].post(body)

    async def is_dead(self, name: str) -> bool:
        return self.replicas[name].is_dead


def answer_with_store(replica: SimulatedReplica, pending: tuple[str, ...] = ()) -> None:
    """The replica answers flushes as an engine with a store does."""
    post = replica.post

    async def answer(body: bytes) -> tuple[int, bytes, float]:
        message = msgspec.msgpack.decode(body)
        if message["type"] != "flush_cache":
            return await post(body)
        tiers = tuple(message.get("tiers", ()))
        replica.taken.append(FlushCache(call_id=message["call_id"], tiers=tiers))
        warm = () if "storage" in tiers else ("storage",)
        result = FlushResult(
            call_id=message["call_id"], status=202 if pending else 200, success=True, message="", mode="now",
            waited_s=0.0, still_warm=warm, pending=pending if "storage" in tiers else (),
        )  # fmt: skip
        return 200, msgspec.msgpack.encode(result), replica.clock.now()

    replica.post = answer  # type: ignore[method-assign]
