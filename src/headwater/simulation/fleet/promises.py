"""The common promises of several engines, checked after every turn."""

from dataclasses import replace
from typing import assert_never

from headwater.client.change_call import Phase
from headwater.client.desired_state import MEMORY_TAGS
from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.messages.base import unpack_ids
from headwater.messages.cache import AttachStorage, DetachStorage, PinPrefix, UnpinPrefix
from headwater.messages.control import ContinueGeneration, Failed, PauseGeneration
from headwater.messages.two_phase import Change
from headwater.messages.weights import ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights
from headwater.simulation.checks.violation import demand
from headwater.simulation.fakes.canary import expected_tokens
from headwater.simulation.fleet.engine import VOCAB_SIZE, FleetState
from headwater.simulation.fleet.server import FIRST_WEIGHTS, TURN_S, Asked, FleetServer, Sent

ALLOWED_S = 1.0 + TURN_S  # after a deadline, which is checked once a turn


class FleetPromises:
    """Follows the answers to callers, and compares the engines with them."""

    def __init__(self, server: FleetServer) -> None:
        self._server = server
        self._reported = FleetState(weights=FIRST_WEIGHTS, label="default")  # by the answers to callers, in their order
        self._is_known = True  # false after an only engine failed to answer a change that it may have made
        self._num_followed = 0  # of the requested changes
        self._open: list[Asked] = []  # not answered, or still in progress
        self._by_mark: dict[str, Asked] = {}
        self._seen_marks: set[str] = set()
        self._open_requests: list[Sent] = []
        self._num_requests = 0

    def check(self) -> None:
        """Check all promises after a turn."""
        now_s = self._server.clock.now()
        self._take_new()
        decided = self._server.decided_without
        demand(not decided, "decided_by_all", f"decided before all engines were prepared: {decided}")
        self._check_marks(now_s)
        for asked in self._open.copy():
            self._check_asked(asked, now_s)
        if all(asked.call.phase in (Phase.PREPARING, Phase.PREPARED) for asked in self._open):
            self._check_serving()
        for sent in [sent for sent in self._open_requests if sent.finish or sent.is_lost]:
            self._open_requests.remove(sent)
            if sent.finish is not None and sent.finish.type == "length" and not sent.meta.weights_versions:
                self._check_text(sent)

    def check_routed(self, sent: Sent) -> None:
        """A request goes to an engine that serves and is not behind another one."""
        server = self._server
        why_out = server.fleet.why_out(sent.engine)
        demand(why_out is None, "routed_to_serving", f"engine {sent.engine}: {why_out}")
        for asked in self._open:
            call = asked.call
            if call.phase is not Phase.COMMITTING:
                continue
            said = {e: answer for e, answer in call.answers.items() if server.fleet.standings[e].is_serving}
            confirmed = [e for e, answer in said.items() if not isinstance(answer, Failed | Exception)]
            is_behind = sent.engine in call.missing and bool(confirmed)
            demand(not is_behind, "routed_to_serving", f"engine {sent.engine} is behind, {confirmed} are not")

    def check_end(self) -> None:
        """All faults and changes have ended: all engines serve, in the state reported to callers."""
        fleet, places = self._server.fleet, self._server.places
        out = {place.index: fleet.why_out(place.index) for place in places}
        demand(fleet.candidates() == [place.index for place in places], "engines_come_back", out)
        states = {place.engine.state for place in places if place.engine is not None}
        demand(len(states) == 1, "all_or_none", states)
        if self._is_known:
            demand(states == {self._reported}, "all_or_none", f"reported {self._reported}, found {states}")
        left = [sent.request.rid for sent in self._open_requests]
        is_running = self._reported.is_serving if self._is_known else next(iter(states)).is_serving
        demand(not (left and is_running), "requests_end", left)

    # ------------------------------------------------------------------------------------------------

    def _take_new(self) -> None:
        for asked in self._server.asked[self._num_followed :]:
            self._open.append(asked)
            self._by_mark |= dict.fromkeys(_marks(asked.change), asked)
        self._num_followed = len(self._server.asked)
        requests = list(self._server.sent.values())
        self._open_requests += requests[self._num_requests :]
        self._num_requests = len(requests)

    def _check_marks(self, now_s: float) -> None:
        """Every update, label and store has a unique mark, which identifies its call."""
        for place in self._server.places:
            if place.engine is None:
                continue
            order = place.engine.state
            for mark in {order.weights, order.label, order.store} - self._seen_marks:
                self._seen_marks.add(mark)
                asked = self._by_mark.get(mark)
                if asked is None or asked.answered_s is None or asked.is_abandoned:
                    continue
                is_allowed = asked.is_reported_done or now_s <= asked.answered_s
                demand(is_allowed, "not_done_is_never_done", f"{asked.change} at {now_s:.2f} s")

    def _check_asked(self, asked: Asked, now_s: float) -> None:
        if asked.answered_s is None:
            is_late = now_s > asked.call.deadline_s + ALLOWED_S
            demand(asked.is_abandoned or not is_late, "answered_in_time", f"{asked.change} at {now_s:.2f} s")
        elif not asked.is_followed:
            asked.is_followed = True
            if asked.is_reported_done:
                self._reported = _after(self._reported, asked.change)
            elif len(self._server.places) == 1:
                self._is_known = False
        if asked.call.phase is Phase.ENDED:
            self._open.remove(asked)

    def _check_serving(self) -> None:
        """With no change in progress, engines that get requests are in the state that the server reports."""
        says, server = self._server.says, self._server
        if says is None:
            return
        for index in server.fleet.candidates():
            engine = server.places[index].engine
            if engine is not None:
                demand(engine.state == says, "serves_as_reported", f"engine {index} is {engine.state}, reported {says}")

    def _check_text(self, sent: Sent) -> None:
        """An answer has the weights and the label that the server reported at some moment during the request."""
        prompt = unpack_ids(sent.request.prompt_ids).tolist()
        history = self._server.history
        ends = [since_s for since_s, _ in history[1:]] + [float("inf")]
        possible = [order for (_, order), end_s in zip(history, ends, strict=True) if end_s >= sent.sent_s]
        weights = {order.weights for order in possible}
        by = {each for each in weights if expected_tokens(prompt, len(sent.tokens), VOCAB_SIZE, each) == sent.tokens}
        where = f"{sent.request.rid} on engine {sent.engine}"
        demand(by, "one_policy", f"{where} was computed by none of {weights}")
        labels = {order.label for order in possible if order.weights in by}
        demand(sent.meta.weight_version in labels, "one_policy", f"{where}: {sent.meta.weight_version} not in {labels}")


def _after(state: FleetState, change: Change) -> FleetState:
    """The state of a server after `change`."""
    match change:
        case UpdateWeights():
            label = change.weight_version or state.label
            weights = change.weights_id or change.path
            return replace(state, weights=weights, label=label, released=state.released - {"weights"})
        case LoadAdapter():
            return replace(state, adapters=_without(state, change.name) | {(change.name, change.path)})
        case UnloadAdapter():
            return replace(state, adapters=_without(state, change.name))
        case SetWeightVersion():
            return replace(state, label=change.weight_version)
        case PauseGeneration():
            return replace(state, is_paused=True)
        case ContinueGeneration():
            return replace(state, is_paused=False)
        case ReleaseMemory():
            return replace(state, released=state.released | set(change.tags or MEMORY_TAGS))
        case ResumeMemory():
            return replace(state, released=state.released - set(change.tags or MEMORY_TAGS))
        case AttachStorage():
            return replace(state, store=f"memory {change.url}")
        case DetachStorage():
            return replace(state, store="")
        case PinPrefix() | UnpinPrefix():
            return state
    assert_never(change)


def _without(state: FleetState, name: str) -> frozenset[tuple[str, str]]:
    return frozenset(each for each in state.adapters if each[0] != name)


def _marks(change: Change) -> set[str]:
    match change:
        case UpdateWeights():
            weights = change.weights_id or change.path
            return {weights, change.weight_version or weights}
        case SetWeightVersion():
            return {change.weight_version}
        case AttachStorage():
            return {f"memory {change.url}"}
    return set()
