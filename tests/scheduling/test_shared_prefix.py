"""When a request waits for a prefix that another one is computing."""

import numpy as np
import pytest
from scheduler_steps import PAGE, Steps, request

from headwater.scheduling.shared_prefix import is_worth_waiting


def setting(*, num_other: int = 80, num_own: int = 80, num_written: int = 0, salt: str = "", no_store: bool = False):
    """A running request with `num_other` prompt tokens, and what one with `num_own` of the same ones has matched."""
    steps = Steps(num_pages=128, max_context=256, prefill_chunk_tokens=8, max_step_tokens=8)
    steps.add("other", num_other, cache_salt=salt)
    steps.plan()
    (other,) = steps.scheduler.running
    other.progress.num_written = num_written
    own = request("own", num_own, no_store=no_store)
    lease = steps.cache.acquire(own.namespace("w"), own.tokens, max_cached_tokens=num_own - 1, no_store=no_store)
    return lease, own.tokens.view(0, num_own - 1), [other]


def worth(lease, matchable, running) -> bool:
    return is_worth_waiting(lease, matchable, running, page_size=PAGE)


def test_a_long_common_prompt_is_waited_for():
    assert worth(*setting())


@pytest.mark.parametrize(("num_own", "expected"), [(64, False), (65, True)])
def test_a_short_gain_is_not(num_own, expected):
    """64 tokens are the least: of 64 prompt tokens 63 may match."""
    assert worth(*setting(num_own=num_own)) is expected


def test_a_quarter_of_what_is_missing_is_the_least_of_long_prompts():
    assert not worth(*setting(num_other=80, num_own=400))
    assert worth(*setting(num_other=100, num_own=400))


def test_nothing_more_comes_from_a_prompt_that_is_written():
    assert not worth(*setting(num_written=80))
    assert not worth(*setting(num_written=79))
    assert worth(*setting(num_written=78))


def test_other_tokens_or_another_namespace_are_not_waited_for():
    lease, matchable, running = setting()
    changed = matchable.copy()
    changed[40] += 1
    assert not worth(lease, changed, running)
    assert not worth(*setting(salt="tenant"))


def test_who_may_not_publish_or_has_left_its_slot_brings_nothing():
    lease, matchable, running = setting()
    running[0].lease.publish_limit = 10  # pages: a flush cut it down
    assert not worth(lease, matchable, running)
    running[0].lease.publish_limit = 16
    assert worth(lease, matchable, running)
    running[0].lease = None
    assert not worth(lease, matchable, running)


def test_a_private_request_never_waits():
    assert not worth(*setting(no_store=True))


def test_views_of_tokens_are_not_changed():
    lease, matchable, running = setting()
    before = matchable.copy()
    worth(lease, matchable, running)
    assert np.array_equal(before, matchable)
