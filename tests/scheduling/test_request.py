"""Phases, the order of service and the end of one request."""

import pytest
from scheduler_steps import request

from headwater.scheduling.request import Phase

W, G, L, P, D, F = (
    Phase.WAITING,
    Phase.GRAMMAR,
    Phase.LOADING,
    Phase.PREFILLING,
    Phase.DECODING,
    Phase.FINISHED,
)
ALLOWED = {(W, G), (G, W), (G, F), (W, L), (W, P), (W, F), (L, W), (L, F), (P, D), (P, W), (P, F), (D, W), (D, F)}


@pytest.mark.parametrize("start", Phase)
@pytest.mark.parametrize("end", Phase)
def test_only_the_changes_of_the_table_exist(start, end):
    """A request that leaves FINISHED, or decodes before its prompt is computed, would be served twice or wrongly."""
    one = request()
    one.phase = start
    if (start, end) in ALLOWED:
        one.enter(end)
        assert one.phase is end
    else:
        with pytest.raises(AssertionError, match=f"{start.value} -> {end.value}"):
            one.enter(end)


def test_running_means_in_a_slot():
    one = request()
    for phase in Phase:
        one.phase = phase
        assert one.is_running == (phase in (P, D))


def test_higher_priority_comes_first_then_the_earlier_arrival():
    early, late, urgent = request("early"), request("late"), request("urgent", priority=1)
    assert sorted([late, urgent, early], key=lambda r: r.queue_key) == [urgent, early, late]
    assert request(priority=-1).queue_key > early.queue_key


def test_stop_tokens_count_only_after_min_new_tokens():
    """`min_new_tokens: 2` with a stop token as the second token: the text goes on; as the third, it ends."""
    one = request(min_new_tokens=2)
    one.stop_token_ids = frozenset({7})
    for expected in (False, False, True):
        one.tokens.append(7)
        assert one.is_stop_token(7) is expected
    assert not one.is_stop_token(8)


def test_ids_are_compared_with_the_vocabulary_at_both_ends():
    one = request(num_prompt_tokens=3, first_id=0)
    assert one.has_ids_below(3)
    assert not one.has_ids_below(2)
    assert not request(num_prompt_tokens=2, first_id=-1).has_ids_below(100)


def test_the_namespace_follows_the_weights_and_keeps_salt_and_key():
    one = request(cache_salt="tenant")
    first, second = one.namespace("w1"), one.namespace("w2")
    assert (first.cache_salt, first.weights_id) == ("tenant", "w1")
    assert (second.cache_salt, second.weights_id) == ("tenant", "w2")
    assert one.namespace("w1") == first
