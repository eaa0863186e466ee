"""The fleet without sockets: all engines or none, nothing after a 504, and nobody serves who differs."""

import math
from typing import Any

import msgspec
import pytest

from headwater.client.change_call import ChangeCall, Pending, Phase, Untouched
from headwater.client.errors import CallFailed, EngineGone, EngineOut, NotTheSame
from headwater.client.fleet import Fleet
from headwater.clock import ManualClock
from headwater.messages.base import pack_ids
from headwater.messages.cache import AttachStorage, DetachStorage, GetPins, PinGaveWay, PinPrefix
from headwater.messages.control import ContinueGeneration, FlushCache, PauseGeneration
from headwater.messages.generation import Generate, SamplingParams
from headwater.messages.state import EngineReady, EngineState, Hello
from headwater.messages.weights import ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights, WeightVersionSet
from headwater.simulation.fakes.memory import FakeStagedWeights
from headwater.simulation.fleet.engine import FleetEngine

PROMPT = tuple(range(5, 25))


class Server:
    """A fleet and its engines, turned together. `silent` ones read nothing and say nothing."""

    def __init__(self, num_engines: int = 2) -> None:
        self.clock = ManualClock()
        self.names = iter(range(10**6))
        self.fleet = Fleet(num_engines, new_call_id=self.new_id, started_with=("w0", "auto"))
        self.engines: list[FleetEngine | None] = [FleetEngine(self.clock) for _ in range(num_engines)]
        self.silent: set[int] = set()
        for engine in self.engines:
            assert engine is not None
            engine.send(Hello(call_id="hello"))
        self.run()
        assert self.fleet.candidates() == list(range(num_engines))

    def new_id(self) -> str:
        return f"call-{next(self.names)}"

    def run(self, turns: int = 12) -> None:
        for _ in range(turns):
            self.post()
            for index, engine in enumerate(self.engines):
                if engine is None or index in self.silent:
                    continue
                engine.turn()
                for answer in engine.take():
                    if isinstance(answer, EngineReady):
                        self.fleet.engine_ready(index, answer, self.clock.now())
                    elif isinstance(answer, PinGaveWay):
                        self.fleet.pin_gave_way(index, answer)
                    elif hasattr(answer, "call_id"):
                        self.fleet.take_answer(index, answer, self.clock.now())
            self.fleet.tick(self.clock.now())

    def post(self) -> None:
        for index, message in self.fleet.take_outbox():
            engine = self.engines[index]
            if engine is not None:
                engine.send(message)

    def wait(self, seconds: float) -> None:
        """Time passes, a tenth of a second in three turns."""
        until_s = self.clock.now() + seconds
        while self.clock.now() < until_s:
            self.run(3)
            self.clock.advance(min(0.1, until_s - self.clock.now()))
        self.run(3)

    def begin(self, change: Any, timeout_s: float = 5.0, **more: Any) -> ChangeCall:
        now_s = self.clock.now()
        return self.fleet.begin(change, deadline_s=now_s + timeout_s, now_s=now_s, **more)

    def change(self, change: Any, timeout_s: float = 5.0, **more: Any) -> ChangeCall:
        call = self.begin(change, timeout_s, **more)
        self.run()
        assert call.outcome is not None
        return call

    def kill(self, index: int) -> None:
        self.engines[index] = None
        self.fleet.engine_gone(index, EngineGone(index, "killed"), self.clock.now())

    def restart(self, index: int, **more: Any) -> FleetEngine:
        engine = self.engines[index] = FleetEngine(self.clock, **more)
        engine.send(Hello(call_id="hello"))
        return engine

    def weights(self) -> list[str]:
        return [engine.runner.weights.current for engine in self.engines if engine is not None]

    def busy(self, index: int, num_tokens: int = 150) -> None:
        engine = self.engines[index]
        assert engine is not None
        sampling = SamplingParams(max_new_tokens=num_tokens)
        engine.send(Generate(rid=self.new_id(), prompt_ids=pack_ids(PROMPT), sampling=sampling))
        self.run(2)


def update(path: str = "w1", label: str = "new") -> UpdateWeights:
    return UpdateWeights(call_id=f"u-{path}", path=path, weight_version=label, timeout_s=5.0)


# --- all or none ---------------------------------------------------------------------------------------


def test_a_change_is_made_by_all() -> None:
    server = Server(3)
    call = server.change(update())
    assert call.outcome is not None and call.outcome.is_decided
    assert server.weights() == ["w1"] * 3
    assert server.fleet.desired is not None and server.fleet.desired.weight_version == "new"


@pytest.mark.parametrize("num_engines", [1, 2])
@pytest.mark.parametrize("num_turns", range(10))
def test_a_caller_who_leaves_at_the_swap_takes_no_tensors_that_are_in_place(num_engines: int, num_turns: int) -> None:
    """He leaves at every moment of the change: what engines read, or have put in place, stays."""
    server = Server(num_engines)
    change = msgspec.structs.replace(update("/staged/1"), weights_id="sent", names=("weight",))
    call = server.begin(change)
    assert server.fleet.staged_in_use == {"/staged/1"}, "from the beginning on"
    server.run(num_turns)
    server.fleet.abandon(call, server.clock.now())
    weights = {name for name in server.weights() if name == "sent"}
    assert not weights or server.fleet.staged_in_use == {"/staged/1"}
    server.wait(10.0)
    has_it = set(server.weights()) == {"sent"}
    assert server.fleet.staged_in_use == ({"/staged/1"} if has_it else frozenset()), "nothing stays in use for ever"


def test_what_one_engine_cannot_none_does() -> None:
    server = Server()
    server.busy(1)
    call = server.change(ReleaseMemory(call_id="r"), timeout_s=0.0)
    assert call.outcome is not None and not call.outcome.is_decided
    first, second = call.outcome.answers.values()
    assert isinstance(first, Untouched)
    assert isinstance(second, CallFailed) and second.failed.blockers == {"running": 1}
    server.run()
    for engine in server.engines:
        assert engine is not None and not engine.runner.kv_memory.is_released
    assert server.fleet.candidates() == [0, 1]


def test_engines_that_read_different_files_make_no_change() -> None:
    server = Server()
    engine = server.engines[1]
    assert engine is not None
    stage = engine.runner.weights.stage
    engine.runner.weights.stage = lambda path, load_format: stage("changed meanwhile", load_format)  # type: ignore[method-assign]
    call = server.change(update())
    assert call.outcome is not None and isinstance(call.outcome.answers[1], NotTheSame)
    server.run()
    assert server.weights() == ["w0", "w0"]


def test_a_silent_engine_is_a_timeout_within_a_second_and_nothing_is_done_later() -> None:
    server = Server()
    server.silent = {1}
    call = server.begin(update(), timeout_s=2.0)
    server.wait(2.99)
    assert call.outcome is not None and not call.outcome.is_decided
    assert isinstance(call.outcome.answers[1], TimeoutError) and isinstance(call.outcome.answers[0], Untouched)
    server.silent = set()
    server.wait(5.0)
    assert server.weights() == ["w0", "w0"]
    assert server.fleet.candidates() == [0, 1]


def test_the_only_engine_does_nothing_of_a_call_that_it_reads_too_late() -> None:
    server = Server(1)
    server.silent = {0}
    call = server.begin(SetWeightVersion(call_id="v", weight_version="late"), timeout_s=2.0)
    server.wait(2.99)
    assert call.outcome is not None and isinstance(call.outcome.answers[0], TimeoutError)
    server.silent = set()
    server.wait(1.0)
    engine = server.engines[0]
    assert engine is not None and engine.parts.scheduler.weight_version == "default"
    assert server.fleet.next_tick_s == math.inf, "nothing is left of it"


def test_what_the_only_engine_did_in_time_counts_though_its_answer_came_late() -> None:
    """A restart would lose it otherwise."""
    server = Server(1)
    engine = server.engines[0]
    assert engine is not None
    call = server.begin(update(), timeout_s=2.0)
    server.post()
    for _ in range(12):
        engine.turn()  # it is done, and the answer is held up
    server.silent = {0}
    server.wait(3.0)
    assert call.outcome is not None and isinstance(call.outcome.answers[0], TimeoutError)
    server.silent = set()
    server.run()
    assert server.fleet.desired is not None and server.fleet.desired.weights_id == "w1"


def test_a_caller_who_leaves_before_the_decision_ends_the_change() -> None:
    server = Server()
    server.silent = {1}
    call = server.begin(update(), timeout_s=60.0)
    server.run()
    server.fleet.abandon(call, server.clock.now())
    server.silent = set()
    server.run()
    assert server.weights() == ["w0", "w0"]
    for engine in server.engines:
        assert engine is not None and engine.parts.control.num_pending == 0


# --- after the decision --------------------------------------------------------------------------------


def decided_while_engine_1_falls_silent(change: Any) -> tuple[Server, ChangeCall]:
    """Both have prepared; the second one hears of nothing any more."""
    server = Server()
    call = server.begin(change, timeout_s=2.0)
    while len(call.answers) < 2 and call.outcome is None and server.fleet._committing is None:
        server.run(1)
    server.silent = {1}
    server.run()
    return server, call


def test_an_engine_that_does_not_confirm_is_fenced_until_it_is_as_told() -> None:
    server, call = decided_while_engine_1_falls_silent(update())
    assert server.fleet.candidates() == [0], "while the change is being confirmed"
    server.wait(2.99)
    assert call.outcome is not None and call.outcome.is_decided
    assert isinstance(call.outcome.answers[1], Pending)
    assert server.weights() == ["w1", "w0"]
    assert server.fleet.candidates() == [0]
    assert "has not confirmed" in (server.fleet.why_out(1) or "")
    server.silent = set()
    server.wait(8.0)
    assert server.weights() == ["w1", "w1"], "its own undoing, and then what it was told"
    assert server.fleet.candidates() == [0, 1]


def test_an_engine_that_had_given_up_what_was_decided_serves_only_when_it_has_made_it() -> None:
    """It refuses the commit, and its answer comes in time."""
    server, call = decided_while_engine_1_falls_silent(update())
    server.wait(2.65)
    assert call.outcome is None, "its caller still waits"
    server.silent = set()
    server.run(2)
    assert call.outcome is not None and call.outcome.is_decided
    assert isinstance(call.outcome.answers[1], Pending) and "has been given up" in call.outcome.answers[1].reason
    assert (server.weights(), server.fleet.candidates()) == (["w1", "w0"], [0])
    server.wait(8.0)
    assert (server.weights(), server.fleet.candidates()) == (["w1", "w1"], [0, 1])


def one_decided_while_another_is_prepared(first_s: float, second_s: float) -> tuple[Server, ChangeCall, ChangeCall]:
    """Two labels with such timeouts; the second engine hears nothing of the first decision."""
    server = Server()
    first = server.begin(SetWeightVersion(call_id="first", weight_version="first"), first_s)
    second = server.begin(SetWeightVersion(call_id="second", weight_version="second"), second_s)
    while server.fleet._committing is not first or second.phase is not Phase.PREPARED:
        assert first.outcome is None and second.outcome is None
        server.run(1)
    server.silent = {1}
    return server, first, second


def test_what_an_engine_had_prepared_when_it_was_fenced_is_cancelled_there() -> None:
    """It holds requests back for a change that never comes, up to the deadline of the change."""
    server, first, second = one_decided_while_another_is_prepared(2.0, 600.0)
    server.wait(3.0)
    assert first.outcome is not None and isinstance(first.outcome.answers[1], Pending)
    assert second.outcome is not None and isinstance(second.outcome.answers[1], Pending)
    server.silent = set()
    server.wait(10.0)
    labels = [(e.parts.scheduler.weight_version, e.parts.control.num_pending) for e in server.engines if e is not None]
    assert labels == [("second", 0)] * 2
    assert server.fleet.candidates() == [0, 1]


def test_a_change_whose_turn_comes_after_its_deadline_is_not_decided() -> None:
    """Engines that have given it up by then could not make it."""
    server, first, second = one_decided_while_another_is_prepared(60.0, 1.0)
    server.run(1)  # the other engine makes the first change
    server.clock.advance(1.7)
    answer = WeightVersionSet(call_id="first", weight_version="first", num_aborted=0)
    server.fleet.take_answer(1, answer, server.clock.now())
    assert first.outcome is not None and first.outcome.is_decided
    assert second.outcome is not None and not second.outcome.is_decided
    assert server.fleet.desired is not None and server.fleet.desired.weight_version == "first"


@pytest.mark.parametrize("later", [False, True], ids=["alone", "undone meanwhile"])
def test_a_late_commit_does_not_win_over_what_was_told_since(later: bool) -> None:
    server, _ = decided_while_engine_1_falls_silent(PauseGeneration(call_id="p", mode="in_place"))
    server.wait(2.99)
    if later:
        server.change(ContinueGeneration(call_id="c"))
    server.silent = set()
    server.wait(8.0)
    assert server.fleet.candidates() == [0, 1]
    assert [e.parts.control.is_paused for e in server.engines if e is not None] == [not later] * 2


def test_an_engine_that_dies_between_the_phases_is_brought_back_to_the_decided_state() -> None:
    server, call = decided_while_engine_1_falls_silent(update())
    server.kill(1)
    assert call.outcome is not None and call.outcome.is_decided
    server.silent = set()
    server.restart(1)
    server.wait(1.0)
    assert server.weights() == ["w1", "w1"]
    assert server.fleet.candidates() == [0, 1]


def test_an_engine_that_dies_while_preparing_ends_the_change_for_all() -> None:
    server = Server()
    server.silent = {1}
    call = server.begin(update(), timeout_s=60.0)
    server.run()
    server.kill(1)
    server.run()
    assert call.outcome is not None and isinstance(call.outcome.answers[1], EngineGone)
    assert server.weights() == ["w0"]


def test_changes_are_confirmed_one_after_the_other() -> None:
    """Two labels at once: the last decision is the last word on every engine."""
    server = Server()
    calls = [server.begin(SetWeightVersion(call_id=f"v{n}", weight_version=f"v{n}")) for n in range(4)]
    server.run(30)
    assert all(call.outcome is not None and call.outcome.is_decided for call in calls)
    assert server.fleet.desired is not None
    labels = {e.parts.scheduler.weight_version for e in server.engines if e is not None}
    assert labels == {server.fleet.desired.weight_version}


# --- engines that come back ------------------------------------------------------------------------------


def test_a_restarted_engine_serves_only_with_all_that_was_told() -> None:
    server = Server()
    server.change(update())
    server.change(AttachStorage(call_id="a", kind="memory", size_bytes=1000))
    server.change(ReleaseMemory(call_id="r", tags=("kv_cache",)))
    server.change(PauseGeneration(call_id="p", mode="retract"))
    server.kill(1)
    assert server.fleet.candidates() == [0]
    engine = server.restart(1)
    for _ in range(60):
        server.run(1)
        if server.fleet.candidates() == [0, 1]:
            break
        assert server.fleet.why_out(1) is not None or not server.fleet.standings[1].is_loaded
    assert server.fleet.candidates() == [0, 1]
    assert (engine.runner.weights.current, engine.parts.scheduler.weight_version) == ("w1", "new")
    assert engine.parts.control.is_paused
    assert engine.parts.control.released_memory == ("kv_cache",)
    assert engine.parts.storage.info("x").kind == "memory"


def test_a_store_is_attached_once_on_the_way_back() -> None:
    """Each time again it would give up what is on its way to the store."""
    server = Server()
    server.change(AttachStorage(call_id="a1", kind="memory", size_bytes=1000))
    server.change(AttachStorage(call_id="a2", kind="memory", size_bytes=2000))
    server.change(AttachStorage(call_id="a3", kind="memory", size_bytes=3000))
    server.kill(1)
    storage = server.restart(1).parts.storage
    attach, sizes = storage.attach, []
    storage.attach = lambda opening, message: (sizes.append(message.size_bytes), attach(opening, message))[1]  # type: ignore[method-assign]
    server.run(40)
    assert server.fleet.candidates() == [0, 1]
    assert sizes == [3000]


def test_a_detached_store_is_not_attached_again() -> None:
    server = Server()
    server.change(AttachStorage(call_id="a", kind="memory", size_bytes=1000))
    server.change(DetachStorage(call_id="d"))
    server.kill(1)
    engine = server.restart(1)
    server.run(40)
    assert server.fleet.candidates() == [0, 1]
    assert engine.parts.storage.info("x").kind == ""


def test_files_that_are_gone_or_changed_keep_a_restarted_engine_out_and_it_says_why() -> None:
    for wrong, words in (("corrupt", "is broken"), ("other", "not w1")):
        server = Server()
        server.change(update())
        server.kill(1)
        engine = server.restart(1)
        stage = engine.runner.weights.stage
        engine.runner.weights.stage = lambda path, form, stage=stage, wrong=wrong: stage(wrong, form)  # type: ignore[method-assign]
        server.wait(3.0)
        assert server.fleet.candidates() == [0]
        assert words in (server.fleet.why_out(1) or "")
        engine.runner.weights.stage = stage  # type: ignore[method-assign]
        server.wait(30.0)
        assert server.fleet.candidates() == [0, 1], "it is tried again"


def test_an_engine_on_its_way_back_never_has_other_weights_under_the_label_that_was_told() -> None:
    """Requests that still run there would be computed by a policy that nobody serves."""
    server = Server()
    server.change(update())
    server.kill(1)
    engine = server.restart(1)
    stage = engine.runner.weights.stage
    engine.runner.weights.stage = lambda path, form: stage("other", form)  # type: ignore[method-assign]
    pairs = set()
    for _ in range(100):
        server.run(1)
        server.clock.advance(0.2)
        pairs.add((engine.runner.weights.current, engine.parts.scheduler.weight_version))
    assert pairs == {("w0", "default")}, "they were read, compared and refused"
    engine.runner.weights.stage = stage  # type: ignore[method-assign]
    for _ in range(100):
        server.run(1)
        server.clock.advance(0.2)
        pairs.add((engine.runner.weights.current, engine.parts.scheduler.weight_version))
    assert pairs == {("w0", "default"), ("w1", "new")}, "weights and label come in one step"
    assert server.fleet.candidates() == [0, 1]


def test_the_way_back_does_not_wait_for_a_step_towards_what_is_no_longer_told() -> None:
    server = Server()
    server.change(ReleaseMemory(call_id="r", tags=("kv_cache",)))
    server.kill(1)
    server.restart(1)
    server.run(1)
    server.silent = {1}
    server.run(3)
    server.change(ResumeMemory(call_id="m"))
    server.silent = set()
    server.run(20)
    assert server.fleet.candidates() == [0, 1], "without the time that a release may take having passed"


def test_an_engine_that_has_yet_to_make_a_decided_change_is_looked_at_again() -> None:
    """What it would leave, after the engine was found to be as told, nobody would see."""
    server = Server()
    server.kill(1)
    server.restart(1)
    heard = server.fleet.take_answer

    def not_yet(engine: int, answer: Any, now_s: float) -> None:
        is_state = isinstance(answer, EngineState)
        heard(engine, msgspec.structs.replace(answer, num_decided=1) if is_state else answer, now_s)

    server.fleet.take_answer = not_yet  # type: ignore[method-assign]
    server.wait(1.0)
    assert server.fleet.candidates() == [0]
    server.fleet.take_answer = heard  # type: ignore[method-assign]
    server.wait(1.0)
    assert server.fleet.candidates() == [0, 1]


def test_partial_checkpoints_are_laid_over_each_other_again_in_their_order() -> None:
    server = Server(1)
    engine = server.engines[0]
    assert engine is not None
    server.change(update("whole"))
    for path in ("part-1", "part-2"):
        call = server.begin(update(path))
        assert server.fleet.desired is not None
        server.run()
        assert call.outcome is not None
    # the fake's checkpoints are whole ones: the last one is enough
    assert [step.path for step in server.fleet.desired.weights] == ["part-2"]
    told = server.fleet.desired
    for path in ("part-3", "part-4"):
        told = told.after(update(path), engines=frozenset({0}), weights_id=path, is_whole=False, now_s=0.0)
    assert [step.path for step in told.weights] == ["part-2", "part-3", "part-4"]
    server.fleet.desired = told
    server.kill(0)
    seen: list[tuple[str, str]] = []
    again = server.restart(0)
    stage, scheduler = again.runner.weights.stage, again.parts.scheduler

    def note(path: str, form: str) -> FakeStagedWeights:
        seen.append((path, scheduler.weight_version))
        return stage(path, form)

    again.runner.weights.stage = note  # type: ignore[method-assign]
    server.run(60)
    assert seen == [("part-2", "default"), ("part-3", ""), ("part-4", "")], "the label is of all parts together"
    assert scheduler.weight_version == "new"
    assert server.fleet.candidates() == [0]


def test_a_change_goes_on_without_an_engine_that_is_out_which_makes_it_before_it_serves() -> None:
    server = Server()
    server.kill(1)
    call = server.change(update())
    assert call.outcome is not None and call.outcome.is_decided
    assert isinstance(call.outcome.answers[1], Pending)
    server.restart(1)
    server.run(40)
    assert server.weights() == ["w1", "w1"]
    server.kill(0)
    server.kill(1)
    call = server.change(update("w2"))
    assert call.outcome is not None and all(isinstance(a, EngineOut) for a in call.outcome.answers.values())


def test_an_engine_that_returns_while_a_change_is_prepared_makes_it_too() -> None:
    server = Server()
    server.kill(1)
    server.silent = {0}
    call = server.begin(update(), timeout_s=60.0)
    server.restart(1)
    server.run(20)
    assert server.fleet.candidates() == [0, 1]
    server.silent = set()
    server.run(60)
    assert call.outcome is not None and call.outcome.is_decided
    assert server.weights() == ["w1", "w1"]
    assert server.fleet.candidates() == [0, 1]


# --- pins ----------------------------------------------------------------------------------------------


def pin(name: str = "pin-1") -> PinPrefix:
    return PinPrefix(call_id=name, prompt_ids=pack_ids(PROMPT), ttl_s=100.0, pin_id=name)


def test_pins_are_wanted_again_after_a_restart_and_not_after_what_ends_them() -> None:
    server = Server()
    for index in (0, 1):
        server.busy(index, num_tokens=1)
    server.change(pin())
    server.kill(1)
    engine = server.restart(1)
    server.run(20)
    assert server.fleet.candidates() == [0]
    (wanted,) = server.fleet.pins_to_set(1, now_s=server.clock.now())
    assert wanted.message.pin_id == "pin-1"
    engine.send(wanted.message)
    server.fleet.pins_are_set(1, now_s=server.clock.now())
    server.run(20)
    assert server.fleet.candidates() == [0, 1]
    engine.send(GetPins(call_id="pins"))
    for ending in (update("w9"), ReleaseMemory(call_id="r", tags=("kv_cache",))):
        server = Server()
        server.change(pin())
        server.change(ending)
        assert server.fleet.desired is not None and server.fleet.desired.pins == ()


@pytest.mark.parametrize(
    ("flush", "is_left"),
    [
        (FlushCache(call_id="f"), False),
        (FlushCache(call_id="f", dry_run=True), True),
        (FlushCache(call_id="f", cache_salt="other"), True),
        (FlushCache(call_id="f", tiers=("storage",)), True),
        (FlushCache(call_id="f", prefix_ids=pack_ids(PROMPT[:4])), False),
        (FlushCache(call_id="f", prefix_ids=pack_ids([99, 98])), True),
    ],
)
def test_a_flush_in_scope_ends_a_pin_for_restarts_too(flush: FlushCache, is_left: bool) -> None:
    server = Server()
    server.change(pin())
    server.fleet.flushed(flush)
    assert server.fleet.desired is not None
    assert bool(server.fleet.desired.pins) == is_left


@pytest.mark.parametrize("num_engines", [1, 2])
@pytest.mark.parametrize("tiers", [("device",), ("device", "host")], ids=["device", "both"])
def test_a_pin_that_gave_way_is_set_again_only_where_and_as_far_as_it_is_held(num_engines, tiers) -> None:
    server = Server(num_engines)
    prompt, sampling = pack_ids(range(64)), SamplingParams(max_new_tokens=1)
    for engine in server.engines:
        engine.send(Generate(rid=server.new_id(), prompt_ids=prompt, sampling=sampling))
    server.run()
    call = server.change(msgspec.structs.replace(pin(), prompt_ids=prompt, tiers=tiers))
    assert call.outcome is not None and call.outcome.is_decided
    last = num_engines - 1
    long = Generate(rid=server.new_id(), prompt_ids=pack_ids(range(200, 397)), sampling=sampling)
    server.engines[last].send(long)
    server.run(40)
    assert server.fleet.desired is not None
    by_engine = [server.fleet.desired.pins_on(engine, now_s=server.clock.now()) for engine in range(num_engines)]
    assert [[p.message.tiers for p in pins] for pins in by_engine[:last]] == [[tiers]] * last
    assert [p.message.tiers for p in by_engine[last]] == ([("host",)] if "host" in tiers else [])


def test_a_pin_that_gives_way_before_it_is_decided_is_not_set_again() -> None:
    server = Server()
    server.begin(pin())
    server.fleet.pin_gave_way(1, PinGaveWay(pin_id="pin-1"))
    server.run()
    assert server.fleet.desired is not None
    (kept,) = server.fleet.desired.pins
    assert kept.engines == {0}


def test_a_resumed_server_is_resumed_after_restarts() -> None:
    server = Server()
    server.change(ReleaseMemory(call_id="r"))
    server.change(ResumeMemory(call_id="m"))
    server.kill(1)
    engine = server.restart(1)
    server.run(40)
    assert engine.parts.control.released_memory == ()
    assert server.fleet.candidates() == [0, 1]


@pytest.mark.parametrize("num_engines", [1, 2])
def test_a_part_of_a_checkpoint_leaves_the_whole_one_below_it(num_engines: int, monkeypatch) -> None:
    """A restarted engine that loaded the part alone would have the other tensors of the command line."""
    server = Server(num_engines)
    server.change(update("whole"))
    monkeypatch.setattr(FakeStagedWeights, "is_whole", False)
    server.change(update("part"))
    assert server.fleet.desired is not None
    assert [step.path for step in server.fleet.desired.weights] == ["whole", "part"]


def test_a_caller_who_leaves_the_only_engine_cancels_the_change_there() -> None:
    server = Server(1)
    call = server.begin(update("w1"))
    sent = [message for _, message in server.fleet.take_outbox()]
    server.fleet.abandon(call, server.clock.now())
    cancelled = [message.started_by_call for _, message in server.fleet.take_outbox()]
    assert [message.call_id for message in sent] == cancelled == [call.call_id]


def test_the_only_engine_is_known_to_have_the_store_that_it_has_attached() -> None:
    """Else it would be told to attach the store again after the next fence, and give up its copies."""
    server = Server(1)
    server.change(AttachStorage(call_id="a", kind="memory", size_bytes=1000))
    assert server.fleet.desired is not None
    assert server.fleet.standings[0].store_revision == server.fleet.desired.store_revision == 1
