"""When a request takes its pages from the host, and when it computes them."""

from headwater.cache.host_tier import RestorePolicy
from headwater.cache.lower_tiers import RestoreCost


def cost(
    policy: RestorePolicy = RestorePolicy.AUTO, *, prefill_s: float = 0.001, restore_s: float = 0.0001
) -> RestoreCost:
    """Seconds per token of both ways, as measured once."""
    cost = RestoreCost(min_tokens=32, policy=policy)
    cost.saw_prefill(100, 100 * prefill_s)
    cost.saw_restore(100, 100 * restore_s)
    return cost


def test_the_quicker_way_is_taken() -> None:
    assert cost(prefill_s=0.001, restore_s=0.0001).is_worth(100)
    assert not cost(prefill_s=0.0001, restore_s=0.001).is_worth(100)
    assert not cost().is_worth(31)


def test_restores_win_while_a_time_is_unknown() -> None:
    fresh = RestoreCost(min_tokens=32, policy=RestorePolicy.AUTO)
    assert fresh.is_worth(100)
    fresh.saw_prefill(100, 1e-9)
    assert fresh.is_worth(100)


def test_a_few_slow_copies_do_not_end_restores_forever() -> None:
    """Without restores there are no new measurements of them, so a refusal must lower the estimate."""
    slow = cost(prefill_s=0.001, restore_s=0.01)
    num_refused = 0
    while not slow.is_worth(100):
        num_refused += 1
        assert num_refused < 200
    assert num_refused > 10


def test_always_means_always() -> None:
    assert cost(RestorePolicy.ALWAYS, prefill_s=0.0001, restore_s=1.0).is_worth(32)
    assert not cost(RestorePolicy.ALWAYS).is_worth(31)
