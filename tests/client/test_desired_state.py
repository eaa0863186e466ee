"""What each decided change makes of the desired state, which a restarted engine is brought to."""

import pytest

from headwater.client.desired_state import DesiredPin, DesiredState, WeightsStep
from headwater.messages.base import pack_ids
from headwater.messages.cache import AttachStorage, DetachStorage, PinPrefix, UnpinPrefix
from headwater.messages.control import FlushCache
from headwater.messages.two_phase import Change
from headwater.messages.weights import ReleaseMemory, ResumeMemory, UpdateWeights

ALL = frozenset({0, 1})
PIN = PinPrefix(call_id="p", pin_id="pin", prompt_ids=pack_ids(range(8)), ttl_s=100.0, tiers=("device", "host"))


def state(**fields: object) -> DesiredState:
    pin = DesiredPin(PIN, ALL, ends_at_s=100.0)
    first = DesiredState(weights=(WeightsStep("w0", "auto", "id0"),), weight_version="v0", pins=(pin,))
    return after(first, *fields.pop("changes", ()), **fields)  # type: ignore[misc]


def after(desired: DesiredState, *changes: Change, **fields: object) -> DesiredState:
    for change in changes:
        desired = desired.after(change, engines=ALL, now_s=0.0, **fields)  # type: ignore[arg-type]
    return desired


def test_new_weights_leave_no_released_weights_and_no_pins() -> None:
    """A restarted engine that released what has been replaced would sleep beside those that serve."""
    released = state(changes=[ReleaseMemory(call_id="r", tags=("weights",))])
    assert released.released == {"weights"} and released.pins, "a pin holds KV, which stays"
    updated = after(released, UpdateWeights(call_id="u", path="w1"), weights_id="id1")
    assert (updated.released, updated.pins, updated.weight_version) == (frozenset(), (), "v0")


def test_weights_leave_released_kv_memory_released() -> None:
    released = state(changes=[ReleaseMemory(call_id="r")])
    assert after(released, UpdateWeights(call_id="u", path="w1"), weights_id="id1").released == {"kv_cache"}
    assert released.pins == ()


def test_a_resume_takes_back_what_it_names_and_keeps_label_and_pins() -> None:
    released = state(changes=[ReleaseMemory(call_id="r", tags=("weights",))])
    resumed = after(released, ResumeMemory(call_id="m", tags=("kv_cache",)))
    assert resumed.released == {"weights"}
    resumed = after(released, ResumeMemory(call_id="m"), weights_id="id0")
    assert (resumed.released, resumed.weight_version, len(resumed.pins)) == (frozenset(), "v0", 1)


def test_a_resume_to_changed_files_has_their_identity_no_label_and_no_pins() -> None:
    released = state(changes=[ReleaseMemory(call_id="r", tags=("weights",))])
    resumed = after(released, ResumeMemory(call_id="m", accept_changed_weights=True), weights_id="id7")
    assert (resumed.weights_id, resumed.weight_version, resumed.pins) == ("id7", "", ())
    assert resumed.weights[-1].path == "w0"


@pytest.mark.parametrize("given", ["prefetch_policy", "write_policy"])
def test_a_policy_that_is_not_given_stays(given: str) -> None:
    first = AttachStorage(call_id="a", kind="memory", prefetch_policy="best_effort", write_policy="write_back")
    again = {"prefetch_policy": "wait_complete", "write_policy": "write_through"}
    second = AttachStorage(call_id="b", kind="memory", **{given: again[given]})  # type: ignore[arg-type]
    store = state(changes=[first, second]).store
    assert store is not None
    wanted = {"prefetch_policy": "best_effort", "write_policy": "write_back"} | {given: again[given]}
    assert {name: getattr(store, name) for name in wanted} == wanted


def test_each_change_of_the_store_has_a_revision_of_its_own() -> None:
    attached = state(changes=[AttachStorage(call_id="a", kind="memory")])
    detached = after(attached, DetachStorage(call_id="d"))
    assert (attached.store_revision, detached.store_revision, detached.store) == (1, 2, None)


@pytest.mark.parametrize(
    ("tiers", "pin_tiers", "is_left"),
    [
        (("device",), ("device",), False),
        (("host",), ("device",), True),
        (("host",), ("device", "host"), False),
        (("device",), ("host",), False),  # its pages may still be on their way to the host
        (("storage",), ("host",), True),
    ],
)
def test_a_flush_of_other_tiers_leaves_a_pin(tiers: tuple[str, ...], pin_tiers: tuple[str, ...], is_left: bool) -> None:
    pin = PinPrefix(call_id="p", pin_id="other", prompt_ids=PIN.prompt_ids, ttl_s=100.0, tiers=pin_tiers)  # type: ignore[arg-type]
    pinned = state(changes=[UnpinPrefix(call_id="u", pin_id="pin"), pin])
    left = pinned.after_flush(FlushCache(call_id="f", tiers=tiers))
    assert bool(left.pins) == is_left


def test_an_unpin_ends_the_pin_on_the_engines_that_it_names() -> None:
    left = state().after(UnpinPrefix(call_id="u", pin_id="pin"), engines=frozenset({1}), now_s=0.0)
    assert [pin.engines for pin in left.pins] == [{0}]
    assert left.after(UnpinPrefix(call_id="u", pin_id="pin"), engines=ALL, now_s=0.0).pins == ()


def test_a_pin_whose_time_is_over_leaves_with_the_next_change() -> None:
    assert state().after(DetachStorage(call_id="d"), engines=ALL, now_s=100.0).pins == ()
