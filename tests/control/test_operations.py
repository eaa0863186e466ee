"""The table of operations: every call that an engine can receive is handled, and its base says how long it may take."""

import pytest

from engine_driver import Driver
from headwater.control.operations import OPERATIONS
from headwater.messages.base import Call, DeferredCall, TimedCall
from headwater.messages.control import ContinueGeneration, Failed, PauseGeneration
from headwater.messages.two_phase import Commit, Prepare
from headwater.messages.weights import UpdateWeights
from headwater.messages.wire import decode_to_engine, encode, tagged

CALLS = tagged(Call)
BY_TWO_PHASES = (Prepare, Commit)  # the driver has one engine: tests/control/test_two_phases.py
FIELDS = {  # those without a default, of all calls
    "path": "w1",
    "kind": "memory",
    "weight_version": "new",
    "name": "weight",
    "prompt_ids": b"\1\0\0\0",
    "ttl_s": 1.0,
    "pin_id": "pin-1",
    "change": UpdateWeights(call_id="change", path="w1"),
    "prepared": "change",
    "number": 0,
}
# on a busy engine
WAITING = {"FlushCache", "UpdateWeights", "ReleaseMemory", "PauseGeneration", "LoadAdapter", "GetChecksums"}


def example(kind: type[Call], **fields: object) -> Call:
    return kind(call_id="call", **({name: FIELDS[name] for name in kind.__struct_fields__ if name in FIELDS} | fields))


def id_of(kind: type) -> str:
    return kind.__name__


@pytest.mark.parametrize("kind", CALLS, ids=id_of)
def test_every_call_crosses_the_wire(kind):
    """A struct in a module that `wire` does not import would be refused as of another version."""
    message = example(kind)
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize("kind", [kind for kind in CALLS if kind not in BY_TWO_PHASES], ids=id_of)
def test_every_call_is_handled(kind):
    """A call that neither the loop nor the table knows raises in the engine, and its caller gets a 500."""
    driver = Driver()
    driver.send(example(kind))
    driver.turn(5)  # what is read or hashed is ready after three polls
    answer = driver.replies["call"]
    assert not (isinstance(answer, Failed) and answer.status == 500), answer


@pytest.mark.parametrize("kind", OPERATIONS, ids=id_of)
def test_operations_that_stay_pending_are_of_deferred_calls(kind):
    """Else a caller that leaves would not cancel them in the engine (`EngineLink.call`)."""
    driver = Driver(is_async=True)
    driver.runner.weights.num_polls = 1000
    driver.generate("a", list(range(40)), 200)
    driver.turn(2)
    driver.send(example(kind, **({"timeout_s": 100.0} if issubclass(kind, TimedCall) else {})))
    driver.turn()
    is_pending = driver.parts.control.num_pending > 0
    assert is_pending == (kind.__name__ in WAITING)
    assert issubclass(kind, DeferredCall) or not is_pending


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_pause_is_answered_before_the_continue_that_ends_it(is_waiting):
    """A server of one engine records changes in the order of their answers: it would stay paused for its restarts."""
    driver = Driver(is_async=True)
    driver.generate("a", list(range(40)), 200)
    driver.turn(2)
    driver.send(PauseGeneration(call_id="pause", mode="in_place"))
    if is_waiting:
        driver.turn()
        assert "pause" not in driver.replies, "a step is in flight"
    driver.send(ContinueGeneration(call_id="continue"))
    driver.turn()
    assert list(driver.replies) == ["pause", "continue"]
    assert not driver.parts.control.is_paused and driver.parts.control.num_pending == 0


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), 1e9])
@pytest.mark.parametrize("kind", [kind for kind in OPERATIONS if issubclass(kind, TimedCall)], ids=id_of)
def test_a_timeout_out_of_range_is_refused_for_every_timed_call(kind, timeout_s):
    """A deadline of NaN would never pass."""
    driver = Driver()
    driver.send(example(kind, timeout_s=timeout_s))
    driver.turn()
    refused = driver.replies["call"]
    assert isinstance(refused, Failed) and (refused.status, refused.param) == (400, "timeout")
    assert driver.parts.control.num_pending == 0
