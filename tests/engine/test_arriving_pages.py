"""Restores whose pages requests find before they are all there: who may read them, and how long they are held."""

import pytest

from engine_driver import Driver, expected
from headwater.cache.namespace import Tier
from headwater.messages.base import pack_ids
from headwater.messages.control import FlushCache
from headwater.messages.generation import Abort, Generate, LogprobParams, SamplingParams
from headwater.simulation.fakes.copier import FakeCopy

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
PROMPT = [7 * i * i % 97 for i in range(38)]


def on_the_host(is_async: bool, **shape) -> Driver:
    """A driver whose host has the pages of PROMPT, and its device nothing."""
    driver = Driver(is_async=is_async, num_pages=40, num_host_pages=100, **shape)
    driver.finish(driver.generate("first", PROMPT, 2))
    driver.settle()
    driver.send(FlushCache(call_id="f", mode="now", tiers=("device",)))
    driver.turn()
    return driver


def begin_restore(driver: Driver, *, is_readable: bool) -> FakeCopy:
    """What was begun last is readable from the next turn on, and done only when the test says so."""
    (copy,) = (copy for copy in driver.copier.open_copies if copy.kind == "restore")
    copy._polls_unreadable = 0 if is_readable else 1000
    copy.delay(1000)
    return copy


def end(copy: FakeCopy) -> None:
    copy._polls_left = 0


@BOTH
def test_a_request_starts_before_its_pages_have_all_arrived(is_async):
    """The point of it; and the copy goes on blocking what waits for idle."""
    driver = on_the_host(is_async)
    answer = driver.generate("a", PROMPT, 3)
    driver.turn()
    copy = begin_restore(driver, is_readable=True)
    driver.finish(answer, max_turns=20)
    assert answer.tokens == expected(PROMPT, 3) and answer.meta.cached_host > 0
    driver.turn(3)  # its own new pages are on the host
    assert not copy.is_finished
    (transfer,) = driver.parts.cache.lower.transfers.transfers
    assert transfer.arriving is not None
    assert all(run.arrival is transfer for run in transfer.arriving.chain()), "they could be copied before they arrive"
    assert driver.parts.blockers() == {"restore": 1}
    end(copy)
    driver.settle()
    driver.check_all_pages_back()


@BOTH
def test_pages_are_held_until_the_copy_is_done_though_nobody_uses_them(is_async):
    """They looked evictable: whoever computed into them next was overwritten by the rest of the copy."""
    driver = on_the_host(is_async)
    driver.generate("a", PROMPT, 1)
    driver.turn()
    copy = begin_restore(driver, is_readable=True)
    driver.turn(4)
    tier_pages = driver.parts.cache.tier_pages[Tier.DEVICE]
    assert tier_pages.num_evictable < len(PROMPT) // 4
    other = driver.generate("other", list(range(100, 190)), 2)
    driver.finish(other, max_turns=50)
    end(copy)
    driver.settle()
    driver.check_all_pages_back()


@BOTH
@pytest.mark.parametrize("tiers", [("device",), ("host",), ("device", "host")], ids="+".join)
def test_a_flush_between_the_two_moments_frees_pages_when_the_copy_is_done(is_async, tiers):
    driver = on_the_host(is_async)
    answer = driver.generate("a", PROMPT, 1)
    driver.turn()
    copy = begin_restore(driver, is_readable=True)
    driver.finish(answer, max_turns=20)
    driver.send(FlushCache(call_id="g", mode="drain", tiers=tiers, timeout_s=60.0))
    driver.turn(5)
    assert "g" not in driver.replies, "a drain that answers now has not waited for the pages of the copy"
    end(copy)
    driver.turn(5)
    assert driver.replies["g"].success
    again = driver.generate("b", PROMPT, 2)
    driver.finish(again)
    assert again.tokens == expected(PROMPT, 2)
    driver.settle()
    driver.check_all_pages_back()


@BOTH
def test_pages_flushed_on_the_host_are_offloaded_again_only_when_they_are_there(is_async):
    """The copy back would carry away what the copy up has yet to write."""
    driver = on_the_host(is_async)
    answer = driver.generate("a", PROMPT, 1)
    driver.turn()
    copy = begin_restore(driver, is_readable=True)
    driver.finish(answer, max_turns=20)
    driver.send(FlushCache(call_id="g", mode="now", tiers=("host",)))
    driver.turn()
    cache = driver.parts.cache
    (root,) = cache.tree.roots.values()
    nodes = [node for node in cache.tree.subtree(root) if Tier.DEVICE in node.runs]
    for node in nodes:
        cache.lower.transfers.offload(node)
    driver.turn(2)
    assert driver.parts.blockers() == {"restore": 1}
    end(copy)
    driver.settle()
    assert all(Tier.HOST in node.runs for node in nodes)
    driver.check_all_pages_back()


def test_a_running_request_goes_over_to_no_page_that_still_arrives():
    """Its next step is one of decodes alone, which waits for nothing. Here it computes what another loads."""
    driver = on_the_host(is_async=True)
    asks_for_logprobs = Generate(
        rid="computes",
        prompt_ids=pack_ids(PROMPT),
        sampling=SamplingParams(max_new_tokens=6, ignore_eos=True),
        logprobs=LogprobParams(prompt_start=0),
    )
    driver.send(asks_for_logprobs)
    loads = driver.generate("loads", PROMPT, 6)
    driver.turn()
    copy = begin_restore(driver, is_readable=True)
    driver.send(Abort(call_id="c", rid="loads"))  # else its own step would wait for the pages
    driver.turn()
    cache = driver.parts.cache
    (lease,) = cache.leases
    arriving = next(transfer for transfer in cache.lower.transfers.transfers if transfer.arriving is not None)
    assert lease.num_shared_pages == 0 and arriving.handle is copy
    assert loads.finish is not None
    driver.finish()
    assert driver.answers["computes"].tokens == expected(PROMPT, 6)
    end(copy)
    driver.settle()
    driver.check_all_pages_back()
