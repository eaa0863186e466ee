"""`EngineClient` for the control routes of a front: its engines are those of replicas, reached over HTTP."""

import asyncio
import dataclasses
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from headwater.client.change_call import ANSWER_GRACE_S, EXPIRY_GRACE_S, ByEngine, Outcome
from headwater.client.desired_state import DesiredState
from headwater.client.errors import CallFailed, EngineGone, EngineOut, ShuttingDown
from headwater.client.fleet import Fleet
from headwater.client.fleet_driver import FleetDriver
from headwater.client.link import new_call_id
from headwater.client.prefix_routes import PrefixRoutes
from headwater.client.standing import GONE, LOADING
from headwater.fleet.carrying import Carrying
from headwater.fleet.flush_round import STORAGE, is_raised, owed_by, settle, store_is_cold, without_store
from headwater.fleet.replica import Beat, FromFront, Post, Replica, Unreachable
from headwater.fleet.watching import IsDead, Watching
from headwater.messages.base import Call, DeferredCall
from headwater.messages.control import CancelOperation, Failed, FlushCache
from headwater.messages.state import EngineReady
from headwater.messages.two_phase import Change, answered_under
from headwater.messages.weights import UpdateWeights

Keep = Callable[[str], Awaitable[None]]  # raises OSError

_SHORTEST_S = 1e-9
_KEEP_S = 1.0
_UNDATED_S = 2.0  # for a message without an end of its own, as `Commit` and `CancelOperation` are
_MOST_FOR_STORE_S = 2.0
_MAX_ENDED = 1000  # names of replicas that have ended
_decode_desired = msgspec.json.Decoder(DesiredState).decode
DRAINING = "it is draining"
log = logging.getLogger(__name__)
PAGE_SIZE = 16  # of the routes' keys, which are text: four bytes count as a token


class FleetClient:
    """Replicas join by their beats and leave when they have ended. One event loop.

    It has those methods of `EngineClient` that routes for control and monitoring use.
    """

    def __init__(
        self,
        post: Post,
        *,
        is_dead: IsDead,
        started_with: tuple[str, str],
        shares_store: bool = False,
        shares_files: bool = True,
        keep: Keep | None = None,
    ) -> None:
        """`is_dead(name)`: whether the process of a replica has surely ended. `shares_store`: all have one store.

        `shares_files`: replicas read what the front has staged, and it need not be carried to them.

        `keep` takes the desired state, where the front that comes after this one finds it (`adopt`).
        """
        self.name = uuid.uuid4().hex
        self._post_http = post
        self._shares_store = shares_store
        self._shares_files = shares_files
        self._keep = keep
        self._refusal: ShuttingDown | None = None
        self.replicas: dict[int, Replica] = {}
        self.routes = PrefixRoutes(page_size=PAGE_SIZE)
        self._fleet = Fleet(0, new_call_id=new_call_id, started_with=started_with, has_members=True)
        self._driver = FleetDriver(self._fleet, post=self._post, set_pin=_no_pins)
        self._watching = Watching(self.replicas, self._driver, is_dead=is_dead, on_leave=self.routes.forget)
        self._sending: set[asyncio.Task[None]] = set()
        self._being_sent: list[str] = []  # the identities of weights in changes under way; "": other changes
        self._ended: deque[str] = deque(maxlen=_MAX_ENDED)

    # --- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Nothing to do: replicas announce themselves."""

    async def close(self) -> None:
        self.refuse_all("the front has shut down")
        for replica in list(self.replicas.values()):
            self._watching.leave(replica, "the front has shut down")
        for task in list(self._sending):
            task.cancel()
        await self._driver.close()

    def refuse_new(self, reason: str) -> None:
        self._refusal = ShuttingDown(0, reason)

    def refuse_all(self, reason: str) -> None:
        self.refuse_new(reason)

    def adapters(self) -> dict[str, str]:
        """The path of each LoRA adapter that is loaded now, by name."""
        return self._fleet.adapters

    @property
    def is_paused(self) -> bool:
        """By order, as its replicas are or will be before they serve."""
        return self._fleet.desired is not None and self._fleet.desired.pause is not None

    @property
    def released(self) -> list[str]:
        """The tags of the memory that is released by order."""
        return [] if self._fleet.desired is None else sorted(self._fleet.desired.released)

    @property
    def staged_in_use(self) -> frozenset[str]:
        """See `Fleet.staged_in_use`."""
        return self._fleet.staged_in_use

    def call_when_staged_in_use_changes(self, call: Callable[[], None]) -> None:
        """See `EngineClient.call_when_staged_in_use_changes`."""
        self._driver.on_staged_in_use = call

    def _received_ids(self) -> list[str]:
        """The weights that a trainer has sent: those of the fleet, and those that are being put in place."""
        steps = () if self._fleet.desired is None else self._fleet.desired.weights
        return [step.weights_id for step in steps if step.is_received] + [id for id in self._being_sent if id]

    async def first_ready(self) -> EngineReady:
        """Waits for a replica that has loaded."""
        while not (found := [each for each in self.ready if each is not None]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return found[0]

    def take_beat(self, beat: Beat) -> FromFront:
        """A replica announces itself; it repeats the answer in its next beat."""
        replica = next((each for each in self.replicas.values() if each.beat.name == beat.name), None)
        if beat.has_ended and replica is not None:
            self._watching.leave(replica, "it has ended")
        if beat.has_ended:
            self._ended.append(beat.name)
        if beat.name in self._ended:  # an earlier beat may come later
            return self._from_front()
        if replica is None:
            # of a flush that another front answered, or that this one forgot, nothing is known here
            owes = FlushCache(call_id=new_call_id()) if beat.front else None
            carrying = None if self._shares_files else Carrying(self._received_ids)
            replica = Replica(self._fleet.join(owes=owes), beat, self._post_http, carrying=carrying)
            self.replicas[replica.number] = replica
            self._watching.begin(replica)
            if beat.desired and beat.front != self.name:
                self._driver.adopt(_decode_desired(beat.desired))
        is_draining = beat.is_draining or replica.beat.is_draining  # an earlier beat may come later
        replica.beat = msgspec.structs.replace(beat, is_draining=is_draining)
        return self._from_front()

    def adopt(self, kept: str) -> None:
        """The desired state that an earlier front has kept; before the first beat."""
        self._driver.adopt(_decode_desired(kept))

    def _from_front(self) -> FromFront:
        return FromFront(front=self.name, desired=self._encoded_desired())

    def _encoded_desired(self) -> str:
        desired = self._fleet.desired
        without_pins = None if desired is None else dataclasses.replace(desired, pins=())
        return "" if without_pins is None else msgspec.json.encode(without_pins).decode()

    # --- state -------------------------------------------------------------------------------------

    @property
    def num_engines(self) -> int:
        return len(self.replicas)

    @property
    def engine_numbers(self) -> Sequence[int]:
        """The numbers of the replicas, which have gaps."""
        return sorted(self.replicas)

    @property
    def num_running(self) -> int:
        return sum(replica.num_running for replica in self.replicas.values())

    @property
    def ready(self) -> tuple[EngineReady | None, ...]:
        return tuple(replica.ready for replica in self.replicas.values())

    @property
    def can_serve(self) -> bool:
        return self._refusal is None and bool(self.candidates())

    @property
    def engines_out(self) -> dict[int, str]:
        return {number: why for number in self.replicas if (why := self.why_out(number)) is not None}

    def why_out(self, number: int) -> str | None:
        """Why a replica takes no requests; None if it does."""
        replica = self.replicas.get(number)
        if replica is None:
            return GONE
        if replica.ready is None:
            return LOADING
        return self._fleet.why_out(number) or (DRAINING if replica.beat.is_draining else None)

    def candidates(self) -> list[Replica]:
        """Replicas that a request may go to."""
        numbers = [number for number in self._fleet.candidates() if number in self.replicas]
        return [self.replicas[number] for number in numbers if not self.replicas[number].beat.is_draining]

    def stays(self, number: int) -> bool:
        """Whether the replica is there and does not leave. It may take no requests for a while."""
        replica = self.replicas.get(number)
        return replica is not None and not replica.beat.is_draining

    def suspect(self, replica: Replica) -> None:
        """A request could not reach it: see at once whether it is still there."""
        self._watching.look_now(replica)

    def silent_for_s(self) -> float:
        now_s = asyncio.get_running_loop().time()
        heard_s = (replica.heard_s for replica in self.candidates())
        return now_s - min(heard_s, default=float("-inf"))

    def forget_prefixes(self) -> None:
        self.routes.clear()

    def flushed(self, flush: FlushCache) -> None:
        self._fleet.flushed(flush)

    # --- calls -------------------------------------------------------------------------------------

    async def change(self, change: Change, *, deadline_s: float, engines: Sequence[int] | None = None) -> Outcome:
        """See `EngineClient.change`."""
        self._require_replicas()
        id = change.weights_id if isinstance(change, UpdateWeights) else ""
        self._being_sent.append(id)
        try:
            outcome = await self._driver.change(change, deadline_s=deadline_s, engines=engines)
        finally:
            self._being_sent.remove(id)
        if outcome.is_decided and self._keep is not None:  # before the caller knows: else a front that dies forgets it
            try:
                async with asyncio.timeout(_KEEP_S):
                    await self._keep(self._encoded_desired())
            except (OSError, TimeoutError) as error:
                log.warning("the state of the fleet is kept by its replicas alone: %s", error or "no answer")
        return outcome

    async def call(self, message: Any, *, engine: int = 0, timeout_s: float | None = None) -> Any:
        """See `EngineClient.call`."""
        replica = self.replicas.get(engine)
        if replica is None:
            raise EngineGone(engine, GONE)
        until_s = None
        if timeout_s is not None:
            deadline_s = asyncio.get_running_loop().time() + timeout_s
            message = msgspec.structs.replace(message, expires_at_s=deadline_s + EXPIRY_GRACE_S)
            until_s = deadline_s + ANSWER_GRACE_S
        try:
            answer = await replica.ask(message, until_s=until_s)
        except (asyncio.CancelledError, TimeoutError):
            if isinstance(message, DeferredCall):
                self._post(engine, CancelOperation(call_id=new_call_id(), started_by_call=message.call_id))
            raise
        except Unreachable:
            self.suspect(replica)
            raise
        if isinstance(answer, Failed):
            raise CallFailed(answer)
        return answer

    async def call_all(self, message: Any, *, timeout_s: float | None = None) -> ByEngine:
        """See `EngineClient.call_all`; the answers know the numbers of their replicas."""
        self._require_replicas()

        async def call(number: int) -> Any:
            self._require_in_step(number)
            return await self.call(message, engine=number, timeout_s=timeout_s)

        return await _gathered({number: call(number) for number in self.replicas})

    async def call_all_by(self, message: FlushCache, *, deadline_s: float, answer_by_s: float) -> ByEngine:
        """A flush on every replica. One that does not say that it flushed is fenced until it has (`flush_round`)."""
        self._require_replicas()
        numbers = list(self.replicas)
        ask = partial(self._flush_one, deadline_s=deadline_s, answer_by_s=answer_by_s)
        rest: FlushCache | None = message
        if self._shares_store and STORAGE in message.tiers and not message.dry_run:
            # the store comes first: else a replica could fetch old pages after its own flush
            first = next((number for number in numbers if self.why_out(number) is None), numbers[0])
            numbers.remove(first)
            asking = asyncio.ensure_future(_gathered({first: ask(message, first)}))
            try:
                await asyncio.wait({asking}, timeout=_store_share_s(answer_by_s))
                if asking.done() and is_raised(asking.result()[0]):
                    rest = without_store(message, message.tiers)
                answers = await self._flush_rest(message, rest, numbers, ask)
                answers[first] = (await asking)[0]
            finally:
                asking.cancel()
        else:
            answers = await self._flush_rest(message, rest, numbers, ask)
        gone = {number for number in answers if number not in self.replicas}
        settled = settle(message, answers, members=self.replicas if rest is not None else answers, gone=gone)
        for number, why in settled.owing.items():
            self._driver.fence(number, why, owes=owed_by(message))
        return ByEngine(settled.answers)

    async def _flush_rest(
        self, message: FlushCache, rest: FlushCache | None, numbers: list[int], ask: Callable[..., Any]
    ) -> dict[int, Any]:
        """`rest`: what the replicas `numbers` are asked for; None: the store was all, and it has been flushed."""
        if rest is None:
            return {}
        found = await _gathered({number: ask(rest, number) for number in numbers})
        answers = dict(zip(found.engines, found, strict=True))
        return answers if rest is message else {number: store_is_cold(each) for number, each in answers.items()}

    async def _flush_one(self, flush: FlushCache, number: int, *, deadline_s: float, answer_by_s: float) -> Any:
        self._require_in_step(number)
        now_s = asyncio.get_running_loop().time()
        left_s = max(deadline_s - now_s, min(flush.timeout_s, _SHORTEST_S))
        flush = msgspec.structs.replace(flush, timeout_s=min(left_s, flush.timeout_s))
        return await self.call(flush, engine=number, timeout_s=answer_by_s - now_s)  # below 0: late, still in the grace

    def _post(self, number: int, message: Call) -> None:
        """A message of `Fleet`; its answer, also that the replica cannot be reached, goes back to it."""
        replica = self.replicas.get(number)
        if replica is not None:
            task = asyncio.get_running_loop().create_task(self._send(replica, message))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self, replica: Replica, message: Call) -> None:
        until_s = message.expires_at_s or asyncio.get_running_loop().time() + _UNDATED_S
        try:
            answer = await replica.ask(message, until_s=until_s)
        except (EngineGone, TimeoutError):
            return  # `Fleet` knows that it has left, and has limits of its own for silence
        except Unreachable as error:
            self.suspect(replica)
            answer = Failed(call_id=answered_under(message), status=503, message=str(error))
        self._driver.take_answer(replica.number, answer)

    def _require_in_step(self, number: int) -> None:
        """A replica that is draining takes calls, since its requests still run."""
        if (why := self.why_out(number)) is not None and why != DRAINING:
            raise EngineOut(number, why)

    def _require_replicas(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if not self.replicas:
            raise EngineOut(0, "no replica has joined the fleet yet")


def _store_share_s(answer_by_s: float) -> float:
    """How long one replica may take to flush the store before all the others are asked to do so as well."""
    return min(_MOST_FOR_STORE_S, (answer_by_s + ANSWER_GRACE_S - asyncio.get_running_loop().time()) / 3)


async def _gathered(calls: dict[int, Any]) -> ByEngine:
    found = await asyncio.gather(*calls.values(), return_exceptions=True)
    return ByEngine(dict(zip(calls, found, strict=True)))


async def _no_pins(number: int, pin: Any) -> None:
    raise AssertionError("a replica that replaces another one joins under a new number, without pins")
