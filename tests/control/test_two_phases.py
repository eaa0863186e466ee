"""Changes in two phases: prepared they show nothing, cancelled or expired they leave nothing, committed they happen."""

from typing import Any

import pytest

from headwater.clock import ManualClock
from headwater.messages.base import pack_ids
from headwater.messages.cache import AttachStorage, DetachStorage, GetPins, GetStorage, PinPrefix, Pins, StorageInfo
from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    Failed,
    FlushCache,
    GetOperations,
    PauseGeneration,
)
from headwater.messages.generation import Generate, Outputs, SamplingParams
from headwater.messages.state import GetState
from headwater.messages.two_phase import Commit, InStep, Prepare, Prepared
from headwater.messages.weights import ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights
from headwater.simulation.fleet.engine import FleetEngine

PROMPT = list(range(5, 25))
CHANGES: dict[str, Any] = {
    "update": UpdateWeights(call_id="c", path="w1", weight_version="new", expires_at_s=5.0),
    "label": SetWeightVersion(call_id="c", weight_version="new", expires_at_s=5.0),
    "release": ReleaseMemory(call_id="c", expires_at_s=5.0),
    "pause": PauseGeneration(call_id="c", expires_at_s=5.0),
    "attach": AttachStorage(call_id="c", kind="memory", size_bytes=1000, expires_at_s=5.0),
    "pin": PinPrefix(call_id="c", prompt_ids=pack_ids(PROMPT), ttl_s=60.0, expires_at_s=5.0),
}
AFTER = {  # changes that need something before them, and what that is
    "resume": (ReleaseMemory(call_id="first"), ResumeMemory(call_id="c", expires_at_s=5.0)),
    "continue": (PauseGeneration(call_id="first"), ContinueGeneration(call_id="c", expires_at_s=5.0)),
    "detach": (
        AttachStorage(call_id="first", kind="memory", size_bytes=1000),
        DetachStorage(call_id="c", expires_at_s=5.0),
    ),
}
ALL = [*CHANGES, *AFTER]


class Bench:
    """An engine, its clock, and the answers by call id, newest last."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.engine = FleetEngine(self.clock)
        self.said: dict[str, list[Any]] = {}
        self.num_outputs = 0
        self.finish: dict[str, Any] = {}

    def ask(self, *messages: Any, turns: int = 8) -> None:
        for message in messages:
            self.engine.send(message)
        for _ in range(turns):
            self.engine.turn()
            for answer in self.engine.take():
                if isinstance(answer, Outputs):
                    self.num_outputs += len(answer.items)
                    self.finish |= {output.rid: output.finish for output in answer.items}
                else:
                    self.said.setdefault(answer.call_id, []).append(answer)

    def picture(self) -> Any:
        """All that a change could have changed."""
        self.ask(GetState(call_id="state"), GetStorage(call_id="storage"), GetPins(call_id="pins"))
        state, storage, pins = (self.said[name][-1] for name in ("state", "storage", "pins"))
        assert isinstance(storage, StorageInfo) and isinstance(pins, Pins)
        return (
            state.weights_id, state.weight_version, state.paused, state.released_memory, storage.kind,
            len(pins.items),
        )  # fmt: skip

    def prepare(self, name: str) -> None:
        """Bring the engine to where change `name` makes a difference, and prepare it."""
        self.generate("warm")
        if name in AFTER:
            self.ask(AFTER[name][0])
        self.change = AFTER[name][1] if name in AFTER else CHANGES[name]
        self.before = self.picture() if name != "pin" else None
        self.ask(Prepare(call_id="p", change=self.change))
        assert isinstance(self.said["c"][-1], Prepared), self.said["c"]

    def generate(self, rid: str, num_tokens: int = 2) -> None:
        sampling = SamplingParams(max_new_tokens=num_tokens)
        self.ask(Generate(rid=rid, prompt_ids=pack_ids(PROMPT), sampling=sampling))


@pytest.mark.parametrize("name", ALL)
def test_what_was_prepared_happens_when_it_is_committed(name: str) -> None:
    bench = Bench()
    bench.prepare(name)
    if name not in ("pin",):
        assert bench.picture() == bench.before, "a prepared change shows already"
    bench.ask(Commit(call_id="go", prepared="c"))
    assert not isinstance(bench.said["c"][-1], Failed | Prepared)
    assert len(bench.said["c"]) == 2
    assert bench.picture() != bench.before


@pytest.mark.parametrize("how", ["cancelled", "expired"])
@pytest.mark.parametrize("name", ALL)
def test_what_was_prepared_and_given_up_leaves_nothing(name: str, how: str) -> None:
    bench = Bench()
    if name == "pin":
        bench.generate("warm")
        before = bench.picture()
        bench.prepare(name)
    else:
        bench.prepare(name)
        before = bench.before
    if how == "cancelled":
        bench.ask(CancelOperation(call_id="x", started_by_call="c"))
    else:
        bench.clock.advance(5.0)  # nobody says a word
        bench.ask()
    assert isinstance(bench.said["c"][-1], Failed)
    assert bench.picture() == before
    bench.ask(Commit(call_id="go", prepared="c"))
    assert bench.said["c"][-1].status == 410, "a commit that comes too late does nothing"
    assert bench.picture() == before
    assert bench.engine.parts.control.num_pending == 0
    bench.ask(ResumeMemory(call_id="r"), ContinueGeneration(call_id="g"))
    outputs = bench.num_outputs
    bench.generate("after")
    assert bench.num_outputs > outputs, "the engine serves on"


def test_requests_run_while_an_update_is_prepared_and_wait_while_a_release_is() -> None:
    bench = Bench()
    bench.prepare("update")
    outputs = bench.num_outputs
    bench.generate("a")
    assert bench.num_outputs > outputs, "an engine that waits for a slower one serves on"
    bench.ask(Commit(call_id="go", prepared="c"))
    bench = Bench()
    bench.prepare("release")
    outputs = bench.num_outputs
    bench.generate("a")
    assert bench.num_outputs == outputs, "idle was promised"
    bench.ask(CancelOperation(call_id="x", started_by_call="c"))
    assert bench.num_outputs > outputs


def test_what_cannot_be_done_is_refused_before_anything_is_promised() -> None:
    for change in (
        UpdateWeights(call_id="c", path="corrupt"),
        AttachStorage(call_id="c", kind="file", directory="broken"),
        PinPrefix(call_id="c", prompt_ids=pack_ids(PROMPT), ttl_s=-1.0),
        ReleaseMemory(call_id="c", tags=("nothing",)),
    ):
        bench = Bench()
        bench.ask(Prepare(call_id="p", change=change))
        (answer,) = bench.said["c"]
        assert isinstance(answer, Failed)
        assert answer.status == 400


def test_a_committed_change_is_not_cancelled_and_does_not_expire() -> None:
    """One engine would stay behind all others."""
    bench = Bench()
    bench.engine.runner.weights.num_polls = 3
    bench.prepare("update")
    bench.engine.send(Commit(call_id="go", prepared="c"))
    bench.engine.send(CancelOperation(call_id="x", started_by_call="c"))
    bench.clock.advance(4.99)
    bench.ask(turns=1)
    assert bench.said["x"][-1].status == 409
    bench.clock.advance(1000.0)
    bench.ask()
    assert bench.said["c"][-1].weights_id == "w1"


def test_an_engine_that_hears_too_late_of_a_decision_refuses_requests_until_it_is_in_step() -> None:
    """What was routed behind the decision would be computed in the old state."""
    bench = Bench()
    bench.prepare("update")
    bench.clock.advance(5.0)
    sampling = SamplingParams(max_new_tokens=2)
    request = Generate(rid="r", prompt_ids=pack_ids(PROMPT), sampling=sampling)
    bench.ask(Commit(call_id="go", prepared="c"), request)
    assert bench.finish["r"].status == 503
    bench.ask(GetState(call_id="s"))
    assert bench.said["s"][-1].is_behind
    bench.ask(InStep(call_id="i"), Generate(rid="r2", prompt_ids=pack_ids(PROMPT), sampling=sampling))
    assert bench.finish["r2"].type == "length"


def test_operations_say_what_is_prepared() -> None:
    bench = Bench()
    bench.prepare("update")
    bench.ask(GetOperations(call_id="ops"))
    (item,) = bench.said["ops"][-1].items
    assert (item.kind, item.phase, item.call_id) == ("update_weights", "prepared", "c")


@pytest.mark.parametrize("name", ALL)
def test_a_call_that_is_read_too_late_is_refused_and_does_nothing(name: str) -> None:
    bench = Bench()
    bench.generate("warm")
    change = AFTER[name][1] if name in AFTER else CHANGES[name]
    if name in AFTER:
        bench.ask(AFTER[name][0])
    before = bench.picture()
    bench.clock.advance(5.0)
    bench.ask(change)
    (answer,) = bench.said["c"]
    assert (answer.status, "nothing was done" in answer.message) == (504, True)
    bench.ask(Prepare(call_id="p", change=change, expires_at_s=5.0))
    assert bench.said["c"][-1].status == 504
    assert bench.picture() == before


def test_an_operation_that_nobody_waits_for_any_more_is_given_up() -> None:
    bench = Bench()
    sampling = SamplingParams(max_new_tokens=100)
    bench.ask(Generate(rid="busy", prompt_ids=pack_ids(PROMPT), sampling=sampling), turns=2)
    bench.ask(FlushCache(call_id="f", timeout_s=60.0, expires_at_s=2.0), turns=2)
    assert "f" not in bench.said
    bench.clock.advance(2.0)
    bench.ask(turns=1)
    assert bench.said["f"][-1].success is False
    bench.ask(turns=100)
    assert bench.engine.parts.cache.generation == 0


def test_a_decided_change_outlives_its_caller_and_its_deadline() -> None:
    """Given up half-way, weights that are overwritten in place would be neither the old nor the new ones."""
    bench = Bench()
    weights = bench.engine.runner.weights
    change = UpdateWeights(call_id="c", path="staged", weights_id="w9", in_place=True, timeout_s=4.0, expires_at_s=5.0)
    bench.ask(Prepare(call_id="p", change=change))
    assert isinstance(bench.said["c"][-1], Prepared)
    weights.num_polls = 6  # of the overwriting
    bench.ask(Commit(call_id="go", prepared="c"), turns=3)
    assert len(bench.said["c"]) == 1, "it is being carried out"
    bench.clock.advance(1000.0)
    bench.ask()
    assert bench.said["c"][-1].weights_id == "w9"


def test_a_decided_release_that_waits_for_a_copy_keeps_no_loop_awake() -> None:
    """After its deadline the loop would look at it again at once, and again, until the copy has ended."""
    bench = Bench()
    bench.prepare("release")
    pending = bench.engine.parts.control.pending
    blockers, pending._blockers = pending._blockers, lambda: {"offload": 1}
    bench.ask(Commit(call_id="go", prepared="c"), turns=3)
    assert len(bench.said["c"]) == 1, "the copy began after it was prepared"
    bench.clock.advance(30.0)
    bench.ask(turns=1)
    assert (pending.next_look_s() or 0.0) > 60.0
    pending._blockers = blockers
    bench.ask(turns=1)
    assert bench.said["c"][-1].released == ("kv_cache", "weights")


def test_continuing_ends_the_pause_in_force_and_none_that_is_only_prepared() -> None:
    """The other engines of the server could make it still, and this one would run on alone."""
    bench = Bench()
    bench.ask(PauseGeneration(call_id="first"))
    bench.ask(Prepare(call_id="p", change=CHANGES["pause"]))
    bench.ask(ContinueGeneration(call_id="go"))
    assert not bench.engine.parts.control.is_paused
    assert [type(answer) for answer in bench.said["c"]] == [Prepared]
    bench.ask(Commit(call_id="commit", prepared="c"))
    assert bench.engine.parts.control.is_paused and bench.said["c"][-1].paused
