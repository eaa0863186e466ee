"""The page's log: what changed between two snapshots, in words."""

from typing import Any

import msgspec

from headwater.http_api.dashboard.happenings import happenings
from headwater.messages.cache import PinInfo, StorageInfo, StoreTrouble
from headwater.messages.control import OperationInfo
from headwater.messages.snapshot import PrefixMap, Snapshot
from headwater.messages.state import EngineState

STATE = EngineState(
    call_id="", num_running=0, num_waiting=0, num_retracted=0, num_paused=0, paused=False, blockers={}, tiers={},
    generation=3, weights_id="w", weight_version="v1", page_size=16, gen_throughput=0.0, uptime_s=10.0,
    counters={"retired_tokens": 100}, max_running=8, max_total_tokens=0, memory_bytes={},
)  # fmt: skip
MAP = PrefixMap(roots=(), nodes=(), num_left_out=0, taken_s=0.0)
FLUSH = OperationInfo(
    operation_id="op-1", kind="flush_cache", phase="waiting_for_idle", waited_s=0, remaining_s=9, blockers={}
)


def snapshot(**state: Any) -> Snapshot:
    now = msgspec.structs.replace(STATE, **({"uptime_s": 11.0} | state))
    return Snapshot(call_id="", state=now, operations=(), storage=StorageInfo(call_id=""), pins=(), map=MAP)


BEFORE = snapshot(uptime_s=10.0)


def texts(before: Snapshot | None, now: Snapshot | None, **more: str) -> list[str]:
    return [text for _, text in happenings(before, now, **more)]


def test_nothing_happened() -> None:
    assert texts(BEFORE, snapshot()) == []


def test_a_flush_and_a_pause() -> None:
    now = snapshot(generation=4, paused=True, counters={"retired_tokens": 2100})
    assert texts(BEFORE, now) == ["flushed 2,000 tokens; generation 4", "paused"]
    assert texts(now, snapshot(generation=6, uptime_s=12.0, counters={"retired_tokens": 2200})) == [
        "flushed 100 tokens in 2 flushes; generation 6",
        "goes on",
    ]


def test_an_operation_that_waits_and_ends() -> None:
    waiting = msgspec.structs.replace(BEFORE, operations=(FLUSH,))
    assert texts(BEFORE, waiting) == ["flush cache waits, waiting for idle"]
    assert texts(waiting, snapshot()) == ["flush cache is no longer pending"]


def test_an_engine_that_falls_silent_and_is_started_again() -> None:
    assert texts(BEFORE, None, why_out="it is gone") == ["does not answer: it is gone"]
    assert texts(None, None) == []
    assert texts(None, BEFORE) == ["answers"]
    assert texts(BEFORE, snapshot(uptime_s=1.0, counters={})) == ["was started again"]


def test_a_store_and_pins() -> None:
    store = StorageInfo(call_id="", kind="file", breaker="closed")
    pin = PinInfo(pin_id="pin-1", num_tokens=16, remaining_s=5)
    now = msgspec.structs.replace(BEFORE, storage=store, pins=(pin,))
    assert texts(BEFORE, now) == ["a store was attached: file", "pin-1 was set"]
    assert texts(now, msgspec.structs.replace(now, pins=())) == ["pin-1 ended"]


def with_store(trouble: StoreTrouble | None, *, breaker: str, dropped: int = 0) -> Snapshot:
    store = StorageInfo(call_id="", kind="file", breaker=breaker, trouble=trouble)
    counters = {"retired_tokens": 100, "dropped_tokens_persist_breaker_open": dropped}
    return msgspec.structs.replace(snapshot(counters=counters), storage=store)


def test_a_store_that_fails_is_one_line_when_it_begins_and_one_when_it_ends() -> None:
    """Its breaker opens and half opens every few seconds, and pages miss it all the time: the log would be full."""
    trouble = StoreTrouble(
        is_left_alone=True, failing=("write",), cause="unavailable", details="no such folder", failing_s=3, retry_in_s=1
    )
    well, bad = with_store(None, breaker="closed"), with_store(trouble, breaker="open", dropped=48)
    failed = "The file store fails: it cannot be reached (no such folder). Requests are served without it."
    assert list(happenings(well, bad)) == [("warning", failed)]
    assert texts(bad, with_store(trouble, breaker="half_open", dropped=96)) == []
    back = with_store(None, breaker="closed", dropped=96)
    assert list(happenings(bad, back)) == [
        ("warning", "48 tokens did not reach a tier: persist breaker open"),
        ("info", "the store answers again"),
    ]


def test_a_store_that_only_rejects_writes_is_named_as_such() -> None:
    partly = StoreTrouble(
        is_left_alone=False, failing=("write",), cause="error", details="READONLY", failing_s=3, retry_in_s=0
    )
    (text,) = texts(with_store(None, breaker="closed"), with_store(partly, breaker="closed"))
    assert text == (
        "The file store fails in part: pages cannot be written; its calls end in errors (READONLY). "
        "Requests are served all the same."
    )


def test_tokens_that_did_not_reach_a_tier() -> None:
    now = snapshot(counters={"retired_tokens": 100, "dropped_tokens_host_full": 1600, "num_parked": 2})
    assert texts(BEFORE, now) == [
        "2 × request was parked: the device had no page left",
        "1,600 tokens did not reach a tier: host full",
    ]
