"""Scripted faults: a test that relies on them needs them to strike, and to strike the same keys each time."""

import threading

import pytest
from faulty_store import Fault, FaultRule, FaultyBackend
from storage_keys import Tenant, make_buffers, make_pages

from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.errors import StorageTimeout, StorageUnavailable
from headwater.storage.memory import MemoryBackend


@pytest.fixture
def faulty() -> FaultyBackend:
    return FaultyBackend(MemoryBackend(capacity_bytes=1 << 20))


def test_without_rules_everything_passes(faulty):
    keys, pages = Tenant().keys(faulty, 3), make_pages(3)
    assert faulty.put(keys, pages) == [WriteStatus.STORED] * 3
    assert faulty.get(keys, make_buffers(pages)) == [ReadStatus.HIT] * 3
    assert faulty.exists(keys) == [True] * 3
    assert faulty.raise_generation(Tenant().scope()) == 1
    assert faulty.reap(max_pages=9) == 3
    assert faulty.usage().num_pages == 0


@pytest.mark.parametrize(("fault", "error"), [("fail", StorageUnavailable), ("timeout", StorageTimeout)])
def test_a_rule_strikes_its_operations_in_its_calls(faulty, fault, error):
    keys, pages = Tenant().keys(faulty, 1), make_pages(1)
    faulty.rules = (FaultRule(Fault(fault), operations=frozenset({"get"}), first_call=1, last_call=2),)
    outcomes = []
    for _ in range(4):
        faulty.put(keys, pages)
        try:
            faulty.get(keys, make_buffers(pages))
            outcomes.append("ok")
        except error:
            outcomes.append("error")
    assert outcomes == ["ok", "error", "error", "ok"]
    assert faulty.num_struck[Fault(fault)] == 2


def struck_keys(rule: FaultRule) -> list[int]:
    backend = FaultyBackend(MemoryBackend(capacity_bytes=1 << 20), [rule])
    pages = make_pages(1)
    struck = []
    for text in range(200):
        try:
            backend.put(Tenant().keys(backend, 1, text=text), pages)
        except StorageUnavailable:
            struck.append(text)
    return struck


def test_the_same_keys_fail_each_time_and_about_the_share():
    operations = frozenset({"put"})
    first = struck_keys(FaultRule(Fault.FAIL, operations, share=0.5))
    assert first == struck_keys(FaultRule(Fault.FAIL, operations, share=0.5))
    assert 70 < len(first) < 130
    assert first != struck_keys(FaultRule(Fault.FAIL, operations, share=0.5, seed=1))


def test_bit_flips_are_found_by_the_checksum(faulty):
    keys, pages = Tenant().keys(faulty, 50), make_pages(50)
    faulty.put(keys, pages)
    faulty.rules = (FaultRule(Fault.CORRUPT, share=0.3),)
    buffers = make_buffers(pages)
    statuses = faulty.get(keys, buffers)
    assert statuses.count(ReadStatus.CORRUPT) == faulty.num_struck[Fault.CORRUPT] > 5
    for status, buffer, page in zip(statuses, buffers, pages, strict=True):
        assert status is ReadStatus.CORRUPT or (status is ReadStatus.HIT and buffer == page)


def test_full_strikes_single_pages(faulty):
    keys, pages = Tenant().keys(faulty, 50), make_pages(50)
    faulty.rules = (FaultRule(Fault.FULL, share=0.5),)
    statuses = faulty.put(keys, pages)
    assert set(statuses) == {WriteStatus.FULL, WriteStatus.STORED}
    assert faulty.exists(keys) == [status is WriteStatus.STORED for status in statuses]


def test_a_hanging_call_ends_when_it_is_released(faulty):
    faulty.rules = (FaultRule(Fault.HANG, operations=frozenset({"usage"})),)
    errors: list[str] = []

    def call() -> None:
        try:
            faulty.usage()
        except StorageTimeout as error:
            errors.append(error.cause)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(timeout=0.1)
    assert thread.is_alive()
    faulty.release()
    thread.join(timeout=60)
    assert errors == ["timeout"]


def test_a_delay_uses_the_clock_it_is_given():
    slept: list[float] = []
    rule = FaultRule(Fault.DELAY, operations=frozenset({"generations"}), delay_s=0.25)
    backend = FaultyBackend(MemoryBackend(capacity_bytes=1 << 20), [rule], sleep=slept.append)
    assert backend.generations([b"s"]) == (0,)
    assert slept == [0.25]


def test_a_share_beyond_one_is_refused():
    with pytest.raises(ValueError, match="share"):
        FaultRule(Fault.FAIL, share=1.5)
