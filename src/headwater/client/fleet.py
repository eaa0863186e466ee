"""Several engines that answer as one server: changes that all of them make or none, and engines that are behind.

No sockets and no clock: messages and time go in, messages to be sent are taken from `take_outbox`. `EngineClient`
drives it in the server, the simulation drives it in virtual time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from headwater.client.change_call import EXPIRY_GRACE_S, ChangeCall, Outcome, Phase, outcome_of
from headwater.client.desired_state import DesiredAdapter, DesiredPin, DesiredState, WeightsStep
from headwater.client.errors import EngineGone, EngineOut, NotTheSame
from headwater.client.standing import LOADING, Restoring, Standing
from headwater.messages.adapters import AdapterLoaded, LoadAdapter
from headwater.messages.cache import PinGaveWay, PinPrefix
from headwater.messages.control import CancelOperation, Failed, FlushCache
from headwater.messages.state import EngineReady
from headwater.messages.two_phase import Change, Commit, Prepare, Prepared
from headwater.messages.weights import MemoryResult, UpdateWeights, WeightsUpdated

IN_FORCE = "a change that is in force on the server"
BEHIND = f"it has not made {IN_FORCE}"


class Fleet:
    """Owns the desired state, the standing of each engine, and every change in progress."""

    def __init__(
        self,
        num_engines: int,
        *,
        new_call_id: Callable[[], str],
        started_with: tuple[str, str] = ("", "auto"),
        has_members: bool = False,
    ) -> None:
        """`started_with`: path and format of the weights of the command line.

        `has_members`: engines join and leave while the fleet serves. Then a change always has two phases.
        """
        self._has_members = has_members
        self._has_decided = False
        self.desired: DesiredState | None = None  # known when the first engine has loaded
        self.standings = [Standing(index) for index in range(num_engines)]
        self._new_call_id = new_call_id
        self._started_with = started_with
        self._outbox: list[tuple[int, Any]] = []
        self._calls: dict[str, ChangeCall] = {}  # in progress, in the order of arrival
        self._committing: ChangeCall | None = None
        self._restoring = Restoring(self._send, new_call_id)

    # --- what is known ------------------------------------------------------------------------------

    def candidates(self) -> list[int]:
        """Engines that a request may go to: those that have confirmed every change, if there are any."""
        serving = [standing.index for standing in self.standings if standing.is_serving]
        if self._committing is None:
            return serving
        unconfirmed = self._committing.missing
        return [index for index in serving if index not in unconfirmed] or serving

    def why_out(self, engine: int) -> str | None:
        """Why an engine that has loaded takes no requests; None if it does, or has not loaded."""
        standing = self.standings[engine]
        return standing.why_out if standing.is_loaded and not standing.is_serving else None

    @property
    def adapters(self) -> dict[str, str]:
        """The path of each LoRA adapter of the desired state, by name."""
        return {} if self.desired is None else {it.name: it.path for it in self.desired.adapters}

    @property
    def weights_to_load(self) -> tuple[str, str] | None:
        """Path and format of the whole checkpoint that a new engine process loads first; None: as it was started."""
        if self.desired is None or self.desired.revision == 0 or not self.desired.weights[0].path:
            return None
        if self.desired.weights[0].is_received:
            return None  # it gets these as an update, before it serves
        return self.desired.weights[0].path, self.desired.weights[0].load_format

    @property
    def staged_in_use(self) -> frozenset[str]:
        """Staging folders of received weights that a restarted engine or a resume reads again, or an engine reads now.

        Also of a change whose caller has left: until its engine answers, it may be in force. Among them are the paths
        of all LoRA adapters, received or not.
        """
        steps = () if self.desired is None else self.desired.weights
        changes = [call.change for call in self._calls.values()]
        read_now = {it.path for it in changes if isinstance(it, UpdateWeights) and it.weights_id}
        read_now |= {it.path for it in changes if isinstance(it, LoadAdapter)}
        return frozenset(read_now | {step.path for step in steps if step.is_received} | set(self.adapters.values()))

    def pins_to_set(self, engine: int, *, now_s: float) -> list[DesiredPin]:
        """Pins that a restarted engine has to compute and set before it serves; then call `pins_are_set`."""
        standing = self.standings[engine]
        if self.desired is None or not standing.wants_pins:
            return []
        return self.desired.pins_on(engine, now_s=now_s)

    def pins_are_set(self, engine: int, *, now_s: float) -> None:
        standing = self.standings[engine]
        standing.has_pins, standing.wants_pins = True, False
        self.tick(now_s)

    @property
    def next_tick_s(self) -> float:
        """When `tick` is due at the latest."""
        looks = [call.next_look_s for call in self._calls.values()]
        return min(looks + [standing.next_look_s for standing in self.standings], default=math.inf)

    def take_outbox(self) -> list[tuple[int, Any]]:
        """(engine, message) pairs to send, in this order."""
        taken, self._outbox = self._outbox, []
        return taken

    # --- engines come and go ------------------------------------------------------------------------

    @property
    def members(self) -> list[int]:
        """The numbers of all engines that have not left. A number is never given twice."""
        return [standing.index for standing in self.standings if not standing.has_left]

    def join(self, *, owes: FlushCache | None = None) -> int:
        """The number of a new engine. `owes`: it may hold pages of a time before this fleet knew it."""
        standing = Standing(len(self.standings))
        self.standings.append(standing)
        if owes is not None:
            standing.owe(owes)
        return standing.index

    def leave(self, engine: int, reason: str, now_s: float) -> None:
        """The engine has ended for good. Another process in its place joins under a new number."""
        self.standings[engine].has_left = True
        self.engine_gone(engine, EngineGone(engine, reason), now_s)

    def adopt(self, desired: DesiredState, now_s: float) -> None:
        """The state that an earlier owner of these engines had decided, unless this one has decided a change."""
        if self._has_decided or (self.desired is not None and self.desired.revision >= desired.revision):
            return
        self.desired = dataclasses.replace(desired, pins=())  # their engines have other numbers now
        for standing in self.standings:
            if standing.is_serving:
                standing.fence(BEHIND)
        self.tick(now_s)

    def fence(self, engine: int, reason: str, now_s: float, *, owes: FlushCache | None = None) -> None:
        """The engine takes no requests until it is found in the desired state, and has made the flush that it owes."""
        standing = self.standings[engine]
        if owes is not None:
            standing.owe(owes)
        if standing.is_loaded:
            standing.fence(reason)
        self.tick(now_s)

    def can_be_reached(self, engine: int, now_s: float) -> None:
        """An engine that did not answer does again: it is asked at once."""
        standing = self.standings[engine]
        if not standing.is_serving:
            standing.asked, standing.retry_at_s = None, now_s
        self.tick(now_s)

    def engine_ready(self, engine: int, ready: EngineReady, now_s: float) -> None:
        """An engine has loaded. It serves at once if it is in the desired state, else it is brought there first."""
        standing = self.standings[engine]
        if standing.is_loaded:
            return
        if self.desired is None:
            path, load_format = self._started_with
            first = WeightsStep(path, load_format, ready.weights_id)
            adapters = _adapters_of(ready)
            self.desired = DesiredState(weights=(first,), weight_version=ready.weight_version, adapters=adapters)
        standing.loaded()
        is_as_desired = self.desired.revision == 0 and ready.weights_id == self.desired.weights_id
        is_as_desired &= _adapters_of(ready) == self.desired.adapters
        if is_as_desired and standing.is_first and not standing.owed:
            standing.serve(self.desired)
        self.tick(now_s)

    def engine_gone(self, engine: int, error: Exception, now_s: float) -> None:
        """The process of `engine` has ended: its calls fail, and its state is lost."""
        self.standings[engine].gone()
        for call in list(self._calls.values()):
            if engine in call.engines and engine not in call.answers:
                self._answered(call, engine, error, now_s)
        self.tick(now_s)

    def flushed(self, flush: FlushCache) -> None:
        """A flush was carried out, on one engine at least."""
        if self.desired is not None and not flush.dry_run:
            self.desired = self.desired.after_flush(flush)

    def pin_gave_way(self, engine: int, notice: PinGaveWay) -> None:
        """A pin has given up its device pages on `engine`: there it is not set again as it was."""
        if self.desired is not None:
            self.desired = self.desired.after_giving_way(notice, engine=engine)
        for call in self._calls.values():  # a pin that is prepared, and not decided yet
            if isinstance(call.change, PinPrefix) and call.change.pin_id == notice.pin_id:
                call.gave_way[engine] = notice

    # --- changes ------------------------------------------------------------------------------------

    def begin(
        self, change: Change, *, deadline_s: float, now_s: float, engines: Sequence[int] | None = None
    ) -> ChangeCall:
        """Start a change on all engines, or on `engines`. Its `outcome` comes within a second of `deadline_s`.

        It does not wait for engines that do not serve: these make the change before they serve again.
        """
        named = frozenset(self.members if engines is None else engines)
        serving = tuple(engine for engine in sorted(named) if self.standings[engine].is_serving)
        change = msgspec.structs.replace(change, expires_at_s=deadline_s + EXPIRY_GRACE_S)
        call = ChangeCall(change, named, serving, is_for_all=engines is None, deadline_s=deadline_s)
        if not serving:
            out = {engine: EngineOut(engine, self.standings[engine].why_out or LOADING) for engine in sorted(named)}
            call.outcome, call.phase = Outcome(False, out), Phase.ENDED
            return call
        self._calls[call.call_id] = call
        # With several engines also a change of one: a direct message could be overtaken by a commit.
        is_alone = len(self.standings) == 1 and not self._has_members
        call.phase = Phase.DIRECT if is_alone else Phase.PREPARING
        for engine in serving:
            if call.phase is Phase.DIRECT:
                self._send(engine, change)
            else:
                self._send(
                    engine, Prepare(call_id=self._new_call_id(), change=change, expires_at_s=change.expires_at_s)
                )
        return call

    def abandon(self, call: ChangeCall, now_s: float) -> None:
        """The caller has left: a change that is not decided is cancelled."""
        if call.phase in (Phase.PREPARING, Phase.PREPARED):
            self._give_up(call)
        elif call.phase is Phase.DIRECT:
            self._cancel(call, call.engines)
        self._advance(now_s)

    def take_answer(self, engine: int, answer: Any, now_s: float) -> None:
        """An answer to a change or to a step of a restoration. Any other answer is ignored."""
        call = self._calls.get(answer.call_id)
        if call is not None and engine in call.engines:
            self._answered(call, engine, answer, now_s)
        elif self.desired is not None:
            self._restoring.take_answer(self.standings[engine], answer, self.desired, now_s)
        self._advance(now_s)

    def tick(self, now_s: float) -> None:
        """Time has passed: overdue changes end."""
        for call in list(self._calls.values()):
            if now_s < call.next_look_s:
                continue
            if call.phase in (Phase.PREPARING, Phase.PREPARED):
                self._give_up(call)
            elif call.phase is Phase.COMMITTING:
                self._end_commit(call)
            elif call.phase is Phase.DIRECT and call.outcome is None:
                self._set_outcome(call, is_decided=False)  # a late answer still counts
        self._advance(now_s)

    # --- the phases of a change ---------------------------------------------------------------------

    def _answered(self, call: ChangeCall, engine: int, answer: Any, now_s: float) -> None:
        if call.phase is Phase.DIRECT:
            self._answered_directly(call, engine, answer, now_s)
        elif call.phase is Phase.PREPARING:
            if not isinstance(answer, Prepared):
                call.answers[engine] = answer
                self._give_up(call)
                return
            if call.answers and answer.weights_id != call.weights_id:
                call.answers[engine] = NotTheSame(engine, answer.weights_id, call.weights_id)
                self._give_up(call)
                return
            call.answers[engine] = answer
            call.weights_id, call.is_whole = answer.weights_id, answer.is_whole
            if not call.missing:
                call.phase = Phase.PREPARED
        elif call.phase is Phase.PREPARED and not isinstance(answer, Prepared):
            call.answers[engine] = answer  # given up, or dead, while another change was being committed
            self._give_up(call)
        elif call.phase is Phase.COMMITTING:
            call.answers[engine] = answer
            if not call.missing:
                self._end_commit(call)
        self._advance(now_s)

    def _answered_directly(self, call: ChangeCall, engine: int, answer: Any, now_s: float) -> None:
        """The answer of the only engine. It counts even if it comes after the caller got a timeout."""
        call.answers[engine] = answer
        is_done = not isinstance(answer, Failed | Exception)
        if is_done:
            weights_id = answer.weights_id if isinstance(answer, WeightsUpdated | MemoryResult) else ""
            weights_id = answer.adapter_id if isinstance(answer, AdapterLoaded) else weights_id
            is_whole = answer.is_whole if isinstance(answer, WeightsUpdated) else True
            self._record(call, weights_id=weights_id, is_whole=is_whole, now_s=now_s)
            assert self.desired is not None
            self.standings[engine].confirm(self.desired)
        if call.outcome is None:
            self._set_outcome(call, is_decided=is_done)
        self._forget(call)

    def _advance(self, now_s: float) -> None:
        """Decide the next change that all its engines have prepared, and restore engines that are behind."""
        while self._committing is None:
            ready = next((call for call in self._calls.values() if call.phase is Phase.PREPARED), None)
            if ready is None:
                break
            self._leave_out_fenced(ready)
            if now_s >= ready.prepare_by_s or not ready.engines:
                self._give_up(ready)
            else:
                self._decide(ready, now_s)
        if self.desired is not None:
            for standing in self.standings:
                self._restoring.advance(standing, self.desired, now_s)

    def _leave_out_fenced(self, call: ChangeCall) -> None:
        """A change that an engine prepared before it fell behind rests on a state that is no longer desired."""
        fenced = [engine for engine in call.engines if not self.standings[engine].is_serving]
        self._cancel(call, fenced)
        call.engines = tuple(engine for engine in call.engines if engine not in fenced)

    def _decide(self, call: ChangeCall, now_s: float) -> None:
        """From here on the change is in force, whatever happens to an engine."""
        self._record(call, weights_id=call.weights_id, is_whole=call.is_whole, now_s=now_s)
        call.phase, call.answers, self._committing = Phase.COMMITTING, {}, call
        for engine in call.engines:
            self._send(engine, Commit(call_id=self._new_call_id(), prepared=call.call_id))

    def _record(self, call: ChangeCall, *, weights_id: str, is_whole: bool, now_s: float) -> None:
        assert self.desired is not None
        self._has_decided = True
        self.desired = self.desired.after(
            call.change, engines=call.named, weights_id=weights_id, is_whole=is_whole, now_s=now_s
        )
        for engine, notice in call.gave_way.items():
            self.desired = self.desired.after_giving_way(notice, engine=engine)
        for standing in self.standings:  # an engine that began to serve while the change was being prepared
            if standing.is_serving and standing.index in call.named and standing.index not in call.engines:
                standing.fence(BEHIND)

    def _end_commit(self, call: ChangeCall) -> None:
        assert self.desired is not None
        for engine in call.engines:
            answer = call.answers.get(engine)
            if answer is None:
                self.standings[engine].fence(f"it has not confirmed {IN_FORCE}")
            elif isinstance(answer, Failed):
                self.standings[engine].fence(f"it did not make {IN_FORCE}: {answer.message}")
            elif not isinstance(answer, Exception):
                self.standings[engine].confirm(self.desired)
        self._set_outcome(call, is_decided=True)
        self._committing = None
        self._forget(call)

    def _give_up(self, call: ChangeCall) -> None:
        """No engine makes the change. Engines that this does not reach undo their preparation by themselves."""
        self._cancel(call, call.engines)
        self._set_outcome(call, is_decided=False)
        self._forget(call)

    def _cancel(self, call: ChangeCall, engines: Iterable[int]) -> None:
        for engine in engines:
            if self.standings[engine].is_loaded:
                self._send(engine, CancelOperation(call_id=self._new_call_id(), started_by_call=call.call_id))

    def _forget(self, call: ChangeCall) -> None:
        call.phase = Phase.ENDED
        del self._calls[call.call_id]

    def _set_outcome(self, call: ChangeCall, *, is_decided: bool) -> None:
        reasons = {engine: self.standings[engine].why_out or BEHIND for engine in call.named}
        call.outcome = outcome_of(call, is_decided=is_decided, reasons=reasons)

    def _send(self, engine: int, message: Any) -> None:
        self._outbox.append((engine, message))


def _adapters_of(ready: EngineReady) -> tuple[DesiredAdapter, ...]:
    return tuple(DesiredAdapter(it.name, it.path, it.adapter_id) for it in ready.adapters)
