"""The order in which waiting requests are served."""

import numpy as np
import pytest
from scheduler_steps import request

from headwater.scheduling.adapters import AdapterContent
from headwater.scheduling.waiting_queue import WaitingQueue


class KnownPrefixes:
    """A cache that knows the beginning of some prompts, by their first token."""

    def __init__(self, **num_known: int) -> None:
        self._num_known = {int(first[1:]): number for first, number in num_known.items()}
        self.version = 0

    def learn(self, first_id: int, number: int) -> None:
        self._num_known[first_id] = number
        self.version += 1

    def peek(self, namespace, tokens: np.ndarray) -> int:
        return self._num_known.get(int(tokens[0]), 0)


def in_order(queue: WaitingQueue, cache=None) -> list[str]:
    return [r.rid for r in queue.in_service_order(cache or KnownPrefixes(), "w")]


def test_a_request_that_comes_back_takes_its_old_place():
    """A retracted request that went to the end of the queue could wait for ever under steady load."""
    first, second, third = request("first"), request("second"), request("third")
    queue = WaitingQueue("fcfs")
    for each in (second, third, first):
        queue.add(each)
    assert in_order(queue) == ["first", "second", "third"]
    queue.remove(second)
    assert in_order(queue) == ["first", "third"]
    queue.add(second)
    assert in_order(queue) == ["first", "second", "third"]


def test_only_a_request_that_waits_can_be_removed():
    queue = WaitingQueue("fcfs")
    queue.add(request("a"))
    stranger = request("b")
    with pytest.raises((AssertionError, IndexError)):
        queue.remove(stranger)


def test_lpm_prefers_known_prompts_within_a_priority_only():
    queue = WaitingQueue("lpm")
    for each in (
        request("unknown", first_id=0),
        request("known", first_id=100),
        request("best known", first_id=200),
        request("urgent", first_id=300, priority=1),
    ):
        queue.add(each)
    assert in_order(queue, KnownPrefixes(t100=4, t200=8)) == ["urgent", "best known", "known", "unknown"]


def test_lpm_serves_equally_known_prompts_by_arrival():
    early, late = request("early"), request("late")
    queue = WaitingQueue("lpm")
    queue.add(late)
    queue.add(early)
    assert in_order(queue) == ["early", "late"]


def test_a_snapshot_does_not_change_with_the_queue():
    """The scheduler removes requests while it goes through the snapshot."""
    one, two = request("one"), request("two")
    queue = WaitingQueue("fcfs")
    queue.add(one)
    queue.add(two)
    served = []
    for each in queue.in_service_order(KnownPrefixes(), "w"):
        queue.remove(each)
        served.append(each.rid)
    assert served == ["one", "two"]
    assert len(queue) == 0


def test_membership_is_by_identity():
    one = request("a")
    queue = WaitingQueue("fcfs")
    assert one not in queue
    queue.add(one)
    assert one in queue
    assert request("a") not in queue


def test_lpm_looks_again_when_the_cache_or_a_request_has_changed():
    """Where nothing has changed the queue does not look: a wrong order would stay for ever."""
    cache, queue = KnownPrefixes(t100=4), WaitingQueue("lpm")
    other, known = request("other", first_id=0), request("known", first_id=100)
    queue.add(other)
    queue.add(known)
    assert in_order(queue, cache) == ["known", "other"]
    cache.learn(0, 8)
    assert in_order(queue, cache) == ["other", "known"]
    cache._num_known[100] = 12  # unseen by the version: only a longer request is looked up
    assert in_order(queue, cache) == ["other", "known"]
    known.tokens.append(1)
    assert in_order(queue, cache) == ["known", "other"]


def test_lpm_looks_again_when_what_a_request_may_match_has_changed():
    """Its adapter or the weights are others: what the cache knew of the prompt was of another namespace."""

    class ByNamespace(KnownPrefixes):
        def peek(self, namespace, tokens: np.ndarray) -> int:
            return 8 if (namespace.adapter, namespace.weights_id) == ("a1", "w1") else 0

    early, late = request("early"), request("late")
    queue, cache = WaitingQueue("lpm"), ByNamespace()
    queue.add(early)
    queue.add(late)

    def order(weights_id: str) -> list[str]:
        return [r.rid for r in queue.in_service_order(cache, weights_id)]

    assert order("w1") == ["early", "late"]
    late.use_adapter(AdapterContent("a1", slot=1, rank=8, num_bytes=1))
    assert order("w1") == ["late", "early"]
    assert order("w0") == ["early", "late"]
    early.use_adapter(AdapterContent("a1", slot=1, rank=8, num_bytes=1))
    assert order("w1") == ["early", "late"]
