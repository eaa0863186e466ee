"""The flush contract, against the real loop, scheduler and cache, in virtual time."""

import math

import pytest

from engine_driver import CLIENT, Driver, expected
from headwater.messages.base import pack_ids
from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    Done,
    Failed,
    FlushCache,
    FlushResult,
    GetOperations,
    PauseGeneration,
)
from headwater.messages.generation import Abort

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 131 + i * i * 7 + i) % 997 for i in range(length)]


def warm(driver: Driver, rid: str, prompt: list[int], **kwargs) -> int:
    """Run a short request to its end; returns how many of its tokens were cached."""
    answer = driver.generate(rid, prompt, 1, **kwargs)
    driver.finish(answer)
    return answer.meta.cached_device


def flush(driver: Driver, call_id: str = "f", **kwargs) -> None:
    driver.send(FlushCache(call_id=call_id, **kwargs))


@BOTH
def test_an_idle_engine_flushes_at_once(is_async):
    driver = Driver(is_async=is_async)
    warm(driver, "a", prompt_of(20))
    flush(driver)
    driver.turn()
    result = driver.replies["f"]
    assert (result.status, result.success, result.message) == (200, True, "Cache flushed.")
    assert result.freed["device"].pages == 5 and result.freed["device"].bytes == 5 * 32
    assert result.generation == 1
    assert warm(driver, "b", prompt_of(20)) == 0


@BOTH
def test_a_flush_right_after_the_last_answer_is_not_refused(is_async):
    """The original report: the answer has left, but something invisible to the client still counts as busy."""
    driver = Driver(is_async=is_async, num_pages=200)
    for turn in range(60):
        warm(driver, f"r{turn}", prompt_of(100, turn))
        flush(driver, f"f{turn}")
        driver.turn()
        assert driver.replies[f"f{turn}"].status == 200
        flush(driver, f"again{turn}")
        driver.turn()
        assert driver.replies[f"again{turn}"].status == 200


@BOTH
def test_busy_without_timeout_is_refused_at_once_and_names_what_blocks(is_async):
    driver = Driver(is_async=is_async, max_running=1)
    for rid in ("running", "queued"):
        driver.generate(rid, prompt_of(10), 50)
    driver.turn(2)
    flush(driver)
    driver.turn()
    result = driver.replies["f"]
    assert (result.status, result.success) == (400, False)
    assert result.blockers == {"running": 1, "queued": 1}
    assert driver.parts.cache.generation == 0


@BOTH
def test_busy_then_idle_flushes_at_the_first_idle_moment(is_async):
    driver = Driver(is_async=is_async)
    answer = driver.generate("a", prompt_of(20), 6)
    driver.turn(2)
    flush(driver, timeout_s=100.0)
    driver.finish(answer)
    driver.turn()
    assert driver.replies["f"].status == 200
    assert answer.tokens == expected(prompt_of(20), 6)


def test_expiry_says_what_blocked_and_flushes_nothing():
    driver = Driver()
    driver.generate("a", prompt_of(20), 10_000)
    driver.turn(2)
    flush(driver, timeout_s=5.0)
    driver.turn()
    driver.clock.advance(4.9)
    driver.turn()
    assert "f" not in driver.replies  # survives before the deadline
    driver.clock.advance(0.2)
    driver.turn()
    result = driver.replies["f"]
    assert (result.status, result.message) == (400, "Timed out waiting for idle state.")
    assert result.blockers == {"running": 1}
    assert result.waited_s == pytest.approx(5.1)
    assert driver.parts.cache.generation == 0


def test_a_step_longer_than_the_deadline_and_its_grace_has_timed_out_as_well():
    """A step on a CPU may take seconds. The caller still waits for the answer, which said that it did not."""
    driver = Driver()
    driver.generate("a", prompt_of(20), 10_000)
    driver.turn(2)
    flush(driver, timeout_s=1.0, expires_at_s=driver.clock.now() + 1.6)
    driver.turn()
    driver.clock.advance(1.7)
    driver.turn()
    result = driver.replies["f"]
    assert (result.status, result.message) == (400, "Timed out waiting for idle state.")
    assert result.blockers == {"running": 1}
    assert driver.parts.cache.generation == 0


def test_a_sleeping_loop_wakes_for_a_deadline():
    """A paused engine has no traffic: only the deadline itself can end the wait."""
    driver = Driver()
    driver.generate("a", prompt_of(20), 100)
    driver.turn(2)
    driver.send(PauseGeneration(call_id="p", mode="in_place"))
    flush(driver, timeout_s=0.25)
    driver.turn(2)
    for _ in range(5):
        driver.turn()
        if "f" in driver.replies:
            break
    assert driver.replies["f"].waited_s == pytest.approx(0.25, abs=0.005)


@BOTH
def test_one_idle_moment_answers_all_that_wait_and_deadlines_differ(is_async):
    driver = Driver(is_async=is_async)
    answer = driver.generate("a", prompt_of(20), 30)
    driver.turn(2)
    for call_id, timeout_s in (("long", 1000.0), ("short", 1.0), ("other", 500.0)):
        flush(driver, call_id, timeout_s=timeout_s)
    driver.turn()
    driver.clock.advance(2.0)
    driver.turn()
    assert set(driver.replies) == {"short"} and driver.replies["short"].status == 400
    driver.finish(answer)
    driver.turn(2)
    assert driver.replies["long"].status == driver.replies["other"].status == 200
    assert driver.replies["long"].generation == driver.replies["other"].generation  # one retirement


@pytest.mark.parametrize("timeout_s", [-1.0, 3601.0, math.nan, math.inf, -math.inf])
def test_a_timeout_out_of_range_is_refused_by_name(timeout_s):
    driver = Driver()
    flush(driver, timeout_s=timeout_s)
    driver.turn()
    result = driver.replies["f"]
    assert isinstance(result, Failed) and result.param == "timeout" and "3600" in result.message


@pytest.mark.parametrize("timeout_s", [0.0, 1e-9, 3600.0])
def test_timeouts_in_range_flush_an_idle_engine(timeout_s):
    driver = Driver()
    flush(driver, timeout_s=timeout_s)
    driver.turn()
    assert driver.replies["f"].status == 200


def test_a_tiny_timeout_on_a_busy_engine_expires_in_the_next_turn():
    driver = Driver()
    driver.generate("a", prompt_of(20), 100)
    driver.turn(2)
    flush(driver, timeout_s=1e-9)
    driver.turn()
    driver.clock.advance(1e-6)
    driver.turn()
    assert driver.replies["f"].message == "Timed out waiting for idle state."


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"tiers": ("host",)}, "tiers"), ({"tiers": ("moon",)}, "tiers"), ({"prefix_ids": b""}, "prefix_ids")],
)
def test_bad_scopes_are_refused_by_name(fields, param):
    driver = Driver()
    flush(driver, **fields)
    driver.turn()
    assert driver.replies["f"].param == param


def test_a_caller_who_goes_away_cancels_its_flush():
    driver = Driver()
    driver.generate("a", prompt_of(20), 200)
    driver.turn(2)
    flush(driver, timeout_s=1000.0)
    driver.turn()
    driver.send(CancelOperation(call_id="c", started_by_call="f"))
    driver.turn()
    assert isinstance(driver.replies["c"], Done)
    assert not driver.replies["f"].success
    driver.finish()
    assert driver.parts.cache.generation == 0


def test_an_operation_is_listed_and_cancelled_by_its_id():
    driver = Driver()
    driver.generate("a", prompt_of(20), 200)
    driver.turn(2)
    flush(driver, timeout_s=1000.0)
    driver.send(GetOperations(call_id="l"))
    driver.turn()
    (listed,) = driver.replies["l"].items
    assert (listed.kind, listed.phase, listed.blockers) == ("flush_cache", "waiting_for_idle", {"running": 1})
    assert listed.remaining_s == pytest.approx(1000.0)
    driver.send(CancelOperation(call_id="c", operation_id=listed.operation_id))
    driver.send(CancelOperation(call_id="c2", operation_id=listed.operation_id))
    driver.turn()
    assert isinstance(driver.replies["c"], Done)
    assert driver.replies["c2"].status == 404


def test_a_cancel_from_another_client_does_not_touch_the_same_call_id():
    driver = Driver()
    driver.generate("a", prompt_of(20), 200)
    driver.turn(2)
    flush(driver, timeout_s=1000.0)
    driver.turn()
    driver.send(CancelOperation(call_id="c", started_by_call="f"), client=b"other")
    driver.turn()
    assert driver.replies["c"].status == 404 and "f" not in driver.replies


# --- pause -------------------------------------------------------------------------------------------


@BOTH
def test_flush_while_paused_with_a_backlog_succeeds(is_async):
    """Queued requests hold nothing: also the waiting variant must not wait for them."""
    driver = Driver(is_async=is_async)
    answers = [driver.generate(f"r{i}", prompt_of(20, i), 10) for i in range(3)]
    driver.turn(3)
    driver.send(PauseGeneration(call_id="p", mode="retract"))
    driver.turn(2)
    assert driver.replies["p"].num_requests == 3
    flush(driver, timeout_s=30.0)
    flush(driver, "now", timeout_s=0.0)
    driver.turn()
    assert driver.replies["f"].status == driver.replies["now"].status == 200
    driver.send(ContinueGeneration(call_id="c"))
    driver.finish()
    for i, answer in enumerate(answers):
        assert answer.tokens == expected(prompt_of(20, i), 10)


@BOTH
def test_pause_while_a_flush_is_pending_lets_it_through(is_async):
    driver = Driver(is_async=is_async)
    driver.generate("a", prompt_of(20), 500)
    driver.turn(3)
    flush(driver, timeout_s=30.0)
    driver.turn()
    driver.send(PauseGeneration(call_id="p", mode="retract"))
    driver.turn(3)
    assert driver.replies["f"].status == 200


def test_pause_in_place_blocks_an_idle_flush_but_not_a_retiring_one():
    driver = Driver()
    answer = driver.generate("a", prompt_of(20), 20)
    driver.turn(3)
    driver.send(PauseGeneration(call_id="p", mode="in_place"))
    flush(driver, "idle")
    flush(driver, "now", mode="now")
    driver.turn(2)
    num_tokens = len(answer.tokens)
    driver.turn(5)
    assert len(answer.tokens) == num_tokens  # frozen
    assert driver.replies["idle"].blockers == {"running": 1}
    assert driver.replies["now"].status == 200
    driver.send(ContinueGeneration(call_id="c"))
    driver.finish()
    assert answer.tokens == expected(prompt_of(20), 20)


def test_pause_abort_ends_requests_and_queues_new_ones():
    driver = Driver()
    answer = driver.generate("a", prompt_of(20), 500)
    driver.turn(3)
    driver.send(PauseGeneration(call_id="p", mode="abort"))
    driver.turn(2)
    assert answer.finish.type == "abort"
    later = driver.generate("b", prompt_of(20), 3)
    driver.turn(5)
    assert later.tokens == []
    driver.send(ContinueGeneration(call_id="c"))
    driver.finish(later)
    assert later.tokens == expected(prompt_of(20), 3)


# --- now, drain, hold --------------------------------------------------------------------------------


class Load:
    """Requests without end: never idle, at least four running."""

    def __init__(self, driver: Driver, **kwargs) -> None:
        self.driver = driver
        self.kwargs = kwargs
        self.answers: list[tuple[list[int], int, object]] = []

    def keep_up(self) -> None:
        while sum(1 for *_, answer in self.answers if not answer.finish) < 4:
            n = len(self.answers)
            prompt = prompt_of(12, n % 3) + prompt_of(6, n)
            length = 5 + n % 7
            self.answers.append((prompt, length, self.driver.generate(f"load{n}", prompt, length, **self.kwargs)))

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.keep_up()
            self.driver.turn()

    def check_texts(self) -> None:
        self.driver.finish()
        for prompt, length, answer in self.answers:
            assert answer.tokens == expected(prompt, length)


@BOTH
def test_now_answers_in_one_turn_under_load_and_nothing_old_is_hit(is_async):
    driver = Driver(is_async=is_async, num_pages=128)
    load = Load(driver)
    load.turns(20)
    flush(driver, mode="now")
    driver.turn()
    result = driver.replies["f"]
    assert result.status == 200 and result.retired["device"].pages > 0 and not result.drained
    driver.turn()  # running requests publish nothing of what is older
    assert warm(driver, "after", [*prompt_of(12, 0), 1]) == 0
    load.turns(20)
    load.check_texts()
    driver.settle()
    driver.check_all_pages_back()


@BOTH
def test_drain_answers_when_the_last_old_lease_ends(is_async):
    driver = Driver(is_async=is_async, num_pages=128)
    old = [driver.generate(f"old{i}", prompt_of(20, i), 10 + 5 * i) for i in range(3)]
    driver.turn(4)
    flush(driver, mode="drain", timeout_s=100.0)
    load = Load(driver)
    while "f" not in driver.replies:
        assert not all(answer.finish for answer in old) or driver.turn(3) is None
        load.turns(1)
    assert all(answer.finish for answer in old)
    assert driver.replies["f"].status == 200 and driver.replies["f"].drained
    load.check_texts()


@pytest.fixture
def held_drain() -> Driver:
    """A drain that waits for a request."""
    driver = Driver()
    driver.generate("a", prompt_of(20), 10_000)
    driver.turn(3)
    flush(driver, mode="drain", timeout_s=1.0)
    driver.turn()
    return driver


def test_drain_that_does_not_end_in_time_says_that_it_flushed(held_drain):
    held_drain.clock.advance(2.0)
    held_drain.turn()
    result = held_drain.replies["f"]
    assert (result.status, result.success, result.drained) == (202, True, False)
    assert result.blockers == {"requests_holding_old_pages": 1}, "the answer says what it waited for"
    assert result.retired["device"].pages > 0


def test_a_drain_that_is_cancelled_says_that_it_flushed_and_that_pages_are_held(held_drain):
    held_drain.send(CancelOperation(call_id="c", started_by_call="f"))
    held_drain.turn()
    result = held_drain.replies["f"]
    assert (result.status, result.success, result.drained) == (202, True, False)
    assert "ended early" in result.message and result.retired["device"].pages > 0


@BOTH
def test_idle_expires_under_steady_load_and_hold_makes_it_succeed(is_async):
    driver = Driver(is_async=is_async, num_pages=128)
    load = Load(driver)
    load.turns(5)
    flush(driver, "idle", timeout_s=5.0)
    for _ in range(20):
        load.turns(1)
        driver.clock.advance(0.3)
    load.turns(1)
    assert driver.replies["idle"].status == 400 and driver.replies["idle"].blockers["running"] > 0
    flush(driver, "held", timeout_s=60.0, hold=True)
    for _ in range(60):
        load.turns(1)
        if "held" in driver.replies:
            break
    assert driver.replies["held"].status == 200
    load.check_texts()  # nobody was refused or lost


# --- scopes ------------------------------------------------------------------------------------------


def test_scopes_leave_the_rest_warm_and_dry_run_says_what_the_real_one_frees():
    driver = Driver(num_pages=128)
    prompt, sibling = prompt_of(40), prompt_of(20) + prompt_of(20, 9)
    for salt in ("", "a"):
        for key in ("", "k"):
            warm(driver, f"{salt}-{key}", prompt, cache_salt=salt, extra_key=key)
    warm(driver, "sibling", sibling)
    scopes = {
        "salt": {"cache_salt": "a"},
        "key": {"extra_key": "k"},
        "prefix": {"prefix_ids": pack_ids(prompt[:22]), "cache_salt": ""},
    }
    for name, scope in scopes.items():
        flush(driver, f"dry-{name}", dry_run=True, **scope)
        driver.turn()
        dry = driver.replies[f"dry-{name}"]
        assert dry.dry_run and dry.freed["device"].pages > 0
        flush(driver, f"dry2-{name}", dry_run=True, **scope)
        flush(driver, name, **scope)
        driver.turn()
        assert driver.replies[f"dry2-{name}"].freed == dry.freed == driver.replies[name].freed
    assert warm(driver, "s", prompt, cache_salt="a") == 0
    assert warm(driver, "p", prompt) == 20  # the pages above the prefix's last token still hit
    assert warm(driver, "q", sibling) == 36


@BOTH
def test_running_requests_outside_a_prefix_scope_go_on_publishing(is_async):
    driver = Driver(is_async=is_async, num_pages=128)
    inside = driver.generate("inside", prompt_of(20, 1), 20)
    outside = driver.generate("outside", prompt_of(20, 2), 20)
    driver.turn(4)
    flush(driver, mode="now", prefix_ids=pack_ids(prompt_of(20, 1)[:10]))
    driver.finish()
    driver.settle()
    assert inside.tokens == expected(prompt_of(20, 1), 20)
    assert warm(driver, "i", prompt_of(20, 1) + inside.tokens) == 8
    assert warm(driver, "o", prompt_of(20, 2) + outside.tokens) == 36


def test_a_dry_run_on_a_busy_engine_names_what_would_block():
    driver = Driver()
    driver.generate("a", prompt_of(20), 50)
    driver.turn(3)
    flush(driver, dry_run=True)
    driver.turn()
    result = driver.replies["f"]
    assert result.status == 200 and result.blockers == {"running": 1} and driver.parts.cache.generation == 0


@pytest.mark.parametrize(("scope", "side_caches"), [({}, {"grammars": 0}), ({"cache_salt": "a"}, {})])
def test_a_dry_run_names_the_side_caches_only_if_the_flush_would_empty_them(scope, side_caches):
    driver = Driver()
    flush(driver, dry_run=True, **scope)
    driver.turn()
    assert driver.replies["f"].side_caches == side_caches


def test_an_abort_ends_the_last_blocker():
    driver = Driver()
    driver.generate("a", prompt_of(20), 500)
    driver.turn(3)
    flush(driver, timeout_s=100.0)
    driver.send(Abort(call_id="x", match="all"), client=CLIENT)
    driver.turn()
    assert isinstance(driver.replies["f"], FlushResult) and driver.replies["f"].status == 200
