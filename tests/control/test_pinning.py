"""Pins on device and host in the real loop: what they keep, what ends them, and that they give everything back."""

import random

import pytest

from engine_driver import VOCAB_SIZE, Driver, expected
from headwater.cache.host_tier import WritePolicy
from headwater.cache.namespace import Tier
from headwater.messages.base import pack_ids
from headwater.messages.cache import GetPins, PinInfo, PinPrefix, UnpinPrefix
from headwater.messages.control import Done, Failed, FlushCache

TIERS = pytest.mark.parametrize("tiers", [("device",), ("host",), ("device", "host")], ids=["device", "host", "both"])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def run(driver: Driver, rid: str, prompt: list[int], num_tokens: int = 2):
    answer = driver.generate(rid, prompt, num_tokens)
    driver.finish(answer)
    assert answer.tokens == expected(prompt, num_tokens)
    driver.settle()
    return answer


def pin(driver: Driver, prompt: list[int], tiers: tuple[str, ...], *, ttl_s: float = 100.0):
    driver.send(PinPrefix(call_id="pin", prompt_ids=pack_ids(prompt), ttl_s=ttl_s, tiers=tiers))
    driver.turn()
    return driver.replies.pop("pin")


def pins(driver: Driver) -> tuple[PinInfo, ...]:
    driver.send(GetPins(call_id="pins"))
    driver.turn()
    return driver.replies.pop("pins").items


@TIERS
@pytest.mark.parametrize("policy", list(WritePolicy), ids=[p.value for p in WritePolicy])
def test_a_pinned_prefix_stays_while_everything_else_is_evicted(tiers, policy) -> None:
    driver = Driver(num_pages=40, num_host_pages=44, write_policy=policy, max_copy_polls=3)
    prompt = prompt_of(60)
    run(driver, "a", prompt)
    (made,) = pin(driver, prompt, tiers).items
    assert (made.num_tokens, made.tiers) == (60, tiers)
    driver.settle()
    assert pins(driver)[0].num_host_tokens == (60 if "host" in tiers else 0)
    for i in range(8):
        run(driver, f"other{i}", prompt_of(90, 10 + i))
    evicted = {tier: tier_pages.num_evicted for tier, tier_pages in driver.parts.cache.tier_pages.items()}
    assert evicted[Tier.DEVICE] > 40 and (evicted[Tier.HOST] > 20 or policy is not WritePolicy.WRITE_THROUGH)
    if tiers == ("host",):
        assert driver.parts.pinning.num_pins == 0, "the device pages are free for others once the host has them"
    meta = run(driver, "again", prompt).meta
    assert (meta.cached_device + meta.cached_host) == 56
    assert meta.cached_device == (0 if tiers == ("host",) else 56)
    driver.send(UnpinPrefix(call_id="u", pin_id=made.pin_id))
    driver.turn()
    assert isinstance(driver.replies["u"], Done) and not pins(driver)
    driver.check_all_pages_back()


@TIERS
@pytest.mark.parametrize("flushed", ["device", "host"])
def test_a_flush_of_what_a_pin_holds_ends_it_and_no_other_does(tiers, flushed) -> None:
    driver = Driver(num_pages=40, num_host_pages=44)
    prompt = prompt_of(60)
    run(driver, "a", prompt)
    pin(driver, prompt, tiers)
    driver.settle()
    driver.send(FlushCache(call_id="f", tiers=(flushed,)))
    driver.turn(2)
    assert driver.replies["f"].status == 200
    assert bool(pins(driver)) == (flushed not in tiers)
    cached = run(driver, "again", prompt).meta
    assert (cached.cached_device if flushed == "device" else cached.cached_host) == 0
    if flushed in tiers:
        driver.check_all_pages_back()


def test_a_pin_on_the_host_outlives_a_split_of_what_it_holds() -> None:
    """A split makes two runs of one; a pin that lost the upper one would never give it back."""
    driver = Driver(num_pages=60, num_host_pages=60)
    prompt = prompt_of(60)
    run(driver, "a", prompt)
    (made,) = pin(driver, prompt, ("host",)).items
    driver.settle()
    run(driver, "b", prompt[:21] + prompt_of(20, 5))
    assert pins(driver)[0].num_host_tokens == 60
    driver.send(UnpinPrefix(call_id="u", pin_id=made.pin_id))
    driver.turn()
    driver.check_all_pages_back()


def test_a_pin_that_finds_no_room_on_the_host_tries_again() -> None:
    driver = Driver(num_pages=60, num_host_pages=40)
    first, second = prompt_of(60, 1), prompt_of(72, 2)
    driver.copier.failure_rate = 1.0
    run(driver, "a", first)
    run(driver, "b", second)
    pin(driver, first, ("device", "host"))
    driver.settle()
    assert pins(driver)[0].num_host_tokens == 0, "every copy fails"
    driver.copier.failure_rate = 0.0
    driver.clock.advance(1.1)
    driver.turn()
    driver.settle()
    assert pins(driver)[0].num_host_tokens == 60
    driver.clock.advance(100)
    driver.turn()
    assert not pins(driver), "its time is over"
    driver.check_all_pages_back()


def test_at_most_half_of_a_tier_is_pinned() -> None:
    driver = Driver(num_pages=60, num_host_pages=40)
    for i in range(2):
        run(driver, f"r{i}", prompt_of(60, i))
    assert pin(driver, prompt_of(60, 0), ("device", "host")).items
    refused = pin(driver, prompt_of(60, 1), ("host",))
    assert isinstance(refused, Failed) and refused.status == 409 and "50% of 40 host pages" in refused.message
    assert pin(driver, prompt_of(60, 1), ("device",)).items
    assert len(pins(driver)) == 2


def test_a_tier_that_does_not_exist_is_named() -> None:
    driver = Driver(num_pages=60)
    for tiers in (("host",), ()):
        refused = pin(driver, prompt_of(60), tiers)
        assert isinstance(refused, Failed) and (refused.status, refused.param) == (400, "tiers")
    driver.check_all_pages_back()
