"""Pins on device and host in the real loop: what they keep, what ends them, and that they give everything back."""

import random

import pytest

from engine_driver import VOCAB_SIZE, Driver, expected
from headwater.cache.host_tier import WritePolicy
from headwater.cache.namespace import Tier
from headwater.messages.base import pack_ids
from headwater.messages.cache import GetPins, PinGaveWay, PinInfo, PinPrefix, UnpinPrefix
from headwater.messages.control import Done, Failed, FlushCache
from headwater.messages.state import GetState, Hello

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


def test_a_pin_that_is_refused_leaves_the_one_of_its_name() -> None:
    driver = Driver(num_pages=60)
    for i in range(2):
        run(driver, f"r{i}", prompt_of(60, i))
    for i, is_refused in ((0, False), (1, True)):
        message = PinPrefix(call_id=f"pin{i}", prompt_ids=pack_ids(prompt_of(60, i)), ttl_s=100.0, pin_id="mine")
        if is_refused:  # others have taken the room meanwhile
            assert pin(driver, prompt_of(60, 1), ("device",)).items
        driver.send(message)
        driver.turn()
        assert isinstance(driver.replies[f"pin{i}"], Failed) == is_refused
    held = {item.pin_id: item for item in pins(driver)}
    assert held["mine"].num_tokens == 60 and len(held) == 2


def test_a_tier_that_does_not_exist_is_named() -> None:
    driver = Driver(num_pages=60)
    for tiers in (("host",), ()):
        refused = pin(driver, prompt_of(60), tiers)
        assert isinstance(refused, Failed) and (refused.status, refused.param) == (400, "tiers")
    driver.check_all_pages_back()


def test_a_prefix_that_was_split_before_is_held_and_given_back() -> None:
    """The upper run would be counted twice, and the second end of its hold would end the engine."""
    driver = Driver(num_pages=60, num_host_pages=60)
    prompt = prompt_of(60)
    run(driver, "a", prompt)
    run(driver, "b", prompt[:21] + prompt_of(20, 5))
    (made,) = pin(driver, prompt, ("host",)).items
    driver.settle()
    assert pins(driver)[0].num_host_tokens == 60
    driver.send(UnpinPrefix(call_id="u", pin_id=made.pin_id))
    driver.turn()
    driver.check_all_pages_back()


# --- giving way -----------------------------------------------------------------------------------------


def pinned(driver: Driver, *ttls: float, tiers: tuple[str, ...] = ("device",), length: int = 24) -> list[str]:
    """A pin for each ttl, of a prompt of its own; their ids."""
    ids = []
    for number, ttl_s in enumerate(ttls):
        run(driver, f"pinned{number}", prompt_of(length, 50 + number))
        (made,) = pin(driver, prompt_of(length, 50 + number), tiers, ttl_s=ttl_s).items
        ids.append(made.pin_id)
    driver.settle()
    return ids


def test_a_request_that_needs_pinned_pages_runs_and_as_few_pins_as_needed_give_way(caplog) -> None:
    """Before, it waited for the end of a pin, perhaps for days, and the whole queue behind it."""
    caplog.set_level("INFO")
    driver = Driver(num_pages=40)
    driver.send(Hello(call_id="hello"))
    first, last, next_ = pinned(driver, 1000.0, 9000.0, 2000.0)
    answer = driver.generate("big", prompt_of(120, 1), 2)
    behind = driver.generate("behind", prompt_of(9, 2), 2)
    driver.finish(answer, behind)
    assert answer.tokens == expected(prompt_of(120, 1), 2)
    found = {item.pin_id: item for item in pins(driver)}
    assert [found[name].tiers for name in (first, next_, last)] == [(), (), ("device",)]
    assert "request 'big' needed 9 more pages" in found[first].gave_way and not found[last].gave_way
    assert f"pin {first} gave way: request 'big'" in caplog.text
    driver.send(GetState(call_id="state"))
    driver.turn()
    assert driver.replies["state"].counters["pins_gave_way"] == 2
    driver.send(UnpinPrefix(call_id="u", pin_id=first))
    driver.clock.advance(3000.0)
    driver.turn()
    assert isinstance(driver.replies["u"], Done)
    assert [item.pin_id for item in pins(driver)] == [last], "a pin that gave way is listed until its time ends"


def test_a_pin_that_frees_too_little_is_spared() -> None:
    """The pin that ends first holds one page, and the next one is enough by itself."""
    driver = Driver(num_pages=40)
    run(driver, "tiny", prompt_of(4, 9))
    (tiny,) = pin(driver, prompt_of(4, 9), ("device",), ttl_s=10.0).items
    (large,) = pinned(driver, 1000.0, length=60)
    driver.finish(driver.generate("big", prompt_of(108, 1), 2))
    assert {item.pin_id: item.tiers for item in pins(driver)} == {tiny.pin_id: ("device",), large: ()}


def test_a_pin_that_shares_all_its_pages_with_another_is_spared() -> None:
    driver = Driver(num_pages=44)
    prompt = prompt_of(60)
    run(driver, "a", prompt)
    (short,) = pin(driver, prompt[:24], ("device",), ttl_s=10.0).items
    (long,) = pin(driver, prompt, ("device",), ttl_s=1000.0).items
    driver.finish(driver.generate("big", prompt_of(124, 1), 2))
    assert {item.pin_id: item.tiers for item in pins(driver)} == {short.pin_id: ("device",), long.pin_id: ()}


def test_the_only_running_request_grows_into_pinned_pages() -> None:
    """It would be retracted, and would wait for a pin's end."""
    driver = Driver(num_pages=40, max_context=400)
    pinned(driver, 1000.0, length=76)
    answer = driver.generate("grows", prompt_of(40, 1), 100)
    driver.finish(answer)
    assert answer.tokens == expected(prompt_of(40, 1), 100) and not answer.meta.num_retractions
    assert [item.tiers for item in pins(driver)] == [()]


@pytest.mark.parametrize("is_async", [False, True], ids=["cpu", "gpu"])
def test_pins_stay_while_a_running_request_will_free_its_pages(is_async) -> None:
    driver = Driver(num_pages=40, is_async=is_async)
    pinned(driver, 1000.0, length=60)
    running = driver.generate("running", prompt_of(40, 1), 12)
    driver.turn(2)
    behind = driver.generate("behind", prompt_of(90, 2), 2)
    driver.finish(running, behind)
    assert behind.tokens == expected(prompt_of(90, 2), 2)
    assert [item.tiers for item in pins(driver)] == [("device",)]


@pytest.mark.parametrize("has_room", [True, False], ids=["copied", "not copied"])
def test_a_pin_that_gives_way_keeps_its_pages_on_the_host(has_room) -> None:
    driver = Driver(num_pages=40, num_host_pages=60)
    driver.send(Hello(call_id="hello"))
    driver.copier.failure_rate = 0.0 if has_room else 1.0
    pinned(driver, 1000.0, tiers=("device", "host"), length=60)
    driver.finish(driver.generate("big", prompt_of(120, 1), 2))
    driver.settle()
    (found,) = pins(driver)
    assert (found.tiers, found.num_host_tokens) == ((("host",), 60) if has_room else ((), 0))
    assert found.gave_way
    meta = run(driver, "again", prompt_of(60, 50)).meta
    assert meta.cached_device + meta.cached_host == (56 if has_room else 36)
    driver.clock.advance(1000.0)
    driver.turn()
    driver.check_all_pages_back()


def test_a_pin_on_the_host_alone_whose_copies_find_no_room_gives_way() -> None:
    """It keeps device pages until they are copied, which may never be."""
    driver = Driver(num_pages=40, num_host_pages=60)
    driver.copier.failure_rate = 1.0
    pinned(driver, 1000.0, tiers=("host",), length=60)
    driver.finish(driver.generate("big", prompt_of(120, 1), 2))
    assert [item.tiers for item in pins(driver)] == [()]


def test_pages_that_gave_way_can_be_pinned_again_and_few_ended_pins_are_listed(monkeypatch) -> None:
    monkeypatch.setattr("headwater.cache.pins._MAX_LISTED", 3)
    driver = Driver(num_pages=8)
    names = []
    for number in range(5):
        run(driver, f"pinned{number}", prompt_of(16, number))
        names += [item.pin_id for item in pin(driver, prompt_of(16, number), ("device",)).items]
        run(driver, f"big{number}", prompt_of(27, 100 + number), 1)
    assert [item.pin_id for item in pins(driver)] == names[-3:]


def test_every_client_gets_a_notice() -> None:
    driver = Driver(num_pages=40)
    for client in (b"one", b"two"):
        driver.send(Hello(call_id=f"hello-{client!r}"), client=client)
    (name,) = pinned(driver, 1000.0, length=60)
    notices = []
    right = driver.wire.send
    driver.wire.send = lambda client, message: (notices.append((client, message)), right(client, message))
    driver.finish(driver.generate("big", prompt_of(120, 1), 2))
    sent = [each for each in notices if isinstance(each[1], PinGaveWay)]
    assert sorted(sent, key=str) == [(client, PinGaveWay(pin_id=name)) for client in (b"one", b"two")]
