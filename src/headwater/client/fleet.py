"""Several engines that answer as one server: changes that all make or none, and engines that have fallen behind.

No sockets and no clock: messages and time go in, messages to be sent are taken from `take_outbox`. `EngineClient`
drives it in the server, the simulation drives it in virtual time.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from headwater.client.change_call import EXPIRY_GRACE_S, ChangeCall, Outcome, Pending, Phase, Untouched
from headwater.client.desired_state import DesiredPin, DesiredState, WeightsStep
from headwater.client.errors import CallFailed, EngineOut, NotTheSame
from headwater.client.standing import LOADING, Restoring, Standing
from headwater.messages.control import CancelOperation, Failed, FlushCache
from headwater.messages.state import EngineReady
from headwater.messages.two_phase import Change, Commit, Prepare, Prepared
from headwater.messages.weights import MemoryResult, WeightsUpdated

BEHIND = "it has not made a change that the server was told"


class Fleet:
    """Owns the desired state, the standing of each engine, and every change that is under way."""

    def __init__(
        self,
        num_engines: int,
        *,
        new_call_id: Callable[[], str],
        started_with: tuple[str, str] = ("", "auto"),
    ) -> None:
        """`started_with`: path and format of the weights that the engines load when nothing else is told."""
        self.desired: DesiredState | None = None  # known when the first engine has loaded
        self.standings = [Standing(index) for index in range(num_engines)]
        self._new_call_id = new_call_id
        self._started_with = started_with
        self._outbox: list[tuple[int, Any]] = []
        self._calls: dict[str, ChangeCall] = {}  # those under way, in the order of their arrival
        self._committing: ChangeCall | None = None
        self._restoring = Restoring(self._send, new_call_id)

    # --- what is known ------------------------------------------------------------------------------

    def candidates(self) -> list[int]:
        """Engines that a request may go to: those that have confirmed all that was told, if there are any."""
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
    def weights_to_load(self) -> tuple[str, str] | None:
        """Path and format of the whole checkpoint that a new engine process loads first; None: as it was started."""
        if self.desired is None or self.desired.revision == 0 or not self.desired.weights[0].path:
            return None
        return self.desired.weights[0].path, self.desired.weights[0].load_format

    def pins_to_set(self, engine: int, *, now_s: float) -> list[DesiredPin]:
        """Pins that a restarted engine has to compute and set before it serves; `pins_are_set` says that it did."""
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
        """(engine, message) to be sent, in this order."""
        taken, self._outbox = self._outbox, []
        return taken

    # --- engines come and go ------------------------------------------------------------------------

    def engine_ready(self, engine: int, ready: EngineReady, now_s: float) -> None:
        """An engine has loaded. It serves at once if it is as it should be, else it is brought there first."""
        standing = self.standings[engine]
        if standing.is_loaded:
            return
        if self.desired is None:
            path, load_format = self._started_with
            first = WeightsStep(path, load_format, ready.weights_id)
            self.desired = DesiredState(weights=(first,), weight_version=ready.weight_version)
        standing.loaded()
        is_as_told = self.desired.revision == 0 and ready.weights_id == self.desired.weights_id
        if is_as_told and standing.is_first:
            standing.serve(self.desired)
        self.tick(now_s)

    def engine_gone(self, engine: int, error: Exception, now_s: float) -> None:
        """Its process has ended: what it was to answer fails, what it had is lost."""
        self.standings[engine].gone()
        for call in list(self._calls.values()):
            if engine in call.engines and engine not in call.heard:
                self._hear(call, engine, error, now_s)
        self.tick(now_s)

    def flushed(self, flush: FlushCache) -> None:
        """A flush was carried out, on one engine at least."""
        if self.desired is not None and not flush.dry_run:
            self.desired = self.desired.after_flush(flush)

    # --- changes ------------------------------------------------------------------------------------

    def begin(
        self, change: Change, *, deadline_s: float, now_s: float, engines: Sequence[int] | None = None
    ) -> ChangeCall:
        """Start a change on all engines, or on those named. Its `outcome` comes by `deadline_s` and a second.

        Those that do not serve are not waited for: they do not serve again before they have made it.
        """
        named = frozenset(range(len(self.standings)) if engines is None else engines)
        serving = tuple(engine for engine in sorted(named) if self.standings[engine].is_serving)
        change = msgspec.structs.replace(change, expires_at_s=deadline_s + EXPIRY_GRACE_S)
        call = ChangeCall(change, named, serving, is_for_all=engines is None, deadline_s=deadline_s)
        if not serving:
            call.outcome, call.phase = Outcome(False, self._all_out(named)), Phase.ENDED
            return call
        self._calls[call.call_id] = call
        # of several engines also for one: what is sent directly could be overtaken by what is committed
        call.phase = Phase.DIRECT if len(self.standings) == 1 else Phase.PREPARING
        for engine in serving:
            if call.phase is Phase.DIRECT:
                self._send(engine, change)
            else:
                self._send(
                    engine, Prepare(call_id=self._new_call_id(), change=change, expires_at_s=change.expires_at_s)
                )
        return call

    def abandon(self, call: ChangeCall, now_s: float) -> None:
        """Nobody waits for the answer any more: what is not decided is cancelled."""
        if call.phase in (Phase.PREPARING, Phase.PREPARED):
            self._give_up(call)
        elif call.phase is Phase.DIRECT:
            self._cancel(call, call.engines)
        self._advance(now_s)

    def heard(self, engine: int, answer: Any, now_s: float) -> None:
        """An engine has answered something. What belongs to nothing here is ignored."""
        call = self._calls.get(answer.call_id)
        if call is not None and engine in call.engines:
            self._hear(call, engine, answer, now_s)
        elif self.desired is not None:
            self._restoring.heard(self.standings[engine], answer, self.desired, now_s)
        self._advance(now_s)

    def tick(self, now_s: float) -> None:
        """Time has passed: what is overdue ends."""
        for call in list(self._calls.values()):
            if now_s < call.next_look_s:
                continue
            if call.phase in (Phase.PREPARING, Phase.PREPARED):
                self._give_up(call)
            elif call.phase is Phase.COMMITTING:
                self._end_commit(call)
            elif call.phase is Phase.DIRECT and call.outcome is None:
                call.outcome = self._outcome(call, is_decided=False)  # a late answer still counts: see _hear_direct
        self._advance(now_s)

    # --- the phases of a change ---------------------------------------------------------------------

    def _hear(self, call: ChangeCall, engine: int, answer: Any, now_s: float) -> None:
        if call.phase is Phase.DIRECT:
            self._hear_direct(call, engine, answer, now_s)
        elif call.phase is Phase.PREPARING:
            if not isinstance(answer, Prepared):
                call.heard[engine] = answer
                self._give_up(call)
                return
            if call.heard and answer.weights_id != call.weights_id:
                call.heard[engine] = NotTheSame(engine, answer.weights_id, call.weights_id)
                self._give_up(call)
                return
            call.heard[engine] = answer
            call.weights_id, call.is_whole = answer.weights_id, answer.is_whole
            if not call.missing:
                call.phase = Phase.PREPARED
        elif call.phase is Phase.PREPARED and not isinstance(answer, Prepared):
            call.heard[engine] = answer  # given up, or dead, while another change was being committed
            self._give_up(call)
        elif call.phase is Phase.COMMITTING:
            call.heard[engine] = answer
            if not call.missing:
                self._end_commit(call)
        self._advance(now_s)

    def _hear_direct(self, call: ChangeCall, engine: int, answer: Any, now_s: float) -> None:
        """The only engine's word. It counts, too, if it comes after the caller has been told that none came."""
        call.heard[engine] = answer
        is_done = not isinstance(answer, Failed | Exception)
        if is_done:
            weights_id = answer.weights_id if isinstance(answer, WeightsUpdated | MemoryResult) else ""
            is_whole = answer.is_whole if isinstance(answer, WeightsUpdated) else True
            self._record(call, weights_id=weights_id, is_whole=is_whole, now_s=now_s)
            assert self.desired is not None
            self.standings[engine].confirm(self.desired)
        if call.outcome is None:
            call.outcome = self._outcome(call, is_decided=is_done)
        self._forget(call)

    def _advance(self, now_s: float) -> None:
        """Decide the next change whose engines could all make it, and bring engines back that are behind."""
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
        """What an engine prepared before it fell behind stands on what is no longer told."""
        fenced = [engine for engine in call.engines if not self.standings[engine].is_serving]
        self._cancel(call, fenced)
        call.engines = tuple(engine for engine in call.engines if engine not in fenced)

    def _decide(self, call: ChangeCall, now_s: float) -> None:
        """From here on the change is in force, whatever becomes of an engine."""
        self._record(call, weights_id=call.weights_id, is_whole=call.is_whole, now_s=now_s)
        call.phase, call.heard, self._committing = Phase.COMMITTING, {}, call
        for engine in call.engines:
            self._send(engine, Commit(call_id=self._new_call_id(), prepared=call.call_id))

    def _record(self, call: ChangeCall, *, weights_id: str, is_whole: bool, now_s: float) -> None:
        assert self.desired is not None
        self.desired = self.desired.after(
            call.change, engines=call.named, weights_id=weights_id, is_whole=is_whole, now_s=now_s
        )
        for standing in self.standings:  # an engine that came while the change was being prepared
            if standing.is_serving and standing.index in call.named and standing.index not in call.engines:
                standing.fence(BEHIND)

    def _end_commit(self, call: ChangeCall) -> None:
        assert self.desired is not None
        for engine in call.engines:
            answer = call.heard.get(engine)
            if answer is None:
                self.standings[engine].fence("it has not confirmed a change that the server was told")
            elif isinstance(answer, Failed):
                self.standings[engine].fence(f"it did not make a change that the server was told: {answer.message}")
            elif not isinstance(answer, Exception):
                self.standings[engine].confirm(self.desired)
        call.outcome = self._outcome(call, is_decided=True)
        self._committing = None
        self._forget(call)

    def _give_up(self, call: ChangeCall) -> None:
        """Nobody makes it. Engines that hear nothing of this undo what they prepared by themselves."""
        self._cancel(call, call.engines)
        call.outcome = self._outcome(call, is_decided=False)
        self._forget(call)

    def _cancel(self, call: ChangeCall, engines: Iterable[int]) -> None:
        for engine in engines:
            if self.standings[engine].is_loaded:
                self._send(engine, CancelOperation(call_id=self._new_call_id(), started_by_call=call.call_id))

    def _forget(self, call: ChangeCall) -> None:
        call.phase = Phase.ENDED
        del self._calls[call.call_id]

    def _outcome(self, call: ChangeCall, *, is_decided: bool) -> Outcome:
        answers: dict[int, Any] = {}
        overdue = call.missing or call.engines or call.named  # the silent ones; all, if another change held them up
        has_failed = any(isinstance(answer, Failed | Exception) for answer in call.heard.values())
        for engine in sorted(call.named):
            answer = call.heard.get(engine)
            has_said_no = answer is None or isinstance(answer, Failed | Exception)
            if is_decided and has_said_no:
                answers[engine] = Pending(self.standings[engine].why_out or BEHIND)
            elif is_decided or (answer is not None and has_said_no):
                answers[engine] = answer
            elif engine in overdue and not has_failed:
                answers[engine] = TimeoutError()
            else:
                answers[engine] = Untouched()
        told = {e: CallFailed(answer) if isinstance(answer, Failed) else answer for e, answer in answers.items()}
        return Outcome(is_decided, told)

    def _all_out(self, engines: Iterable[int]) -> dict[int, Any]:
        return {e: EngineOut(e, self.standings[e].why_out or LOADING) for e in sorted(engines)}

    def _send(self, engine: int, message: Any) -> None:
        self._outbox.append((engine, message))
