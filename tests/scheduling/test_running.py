"""Requests in slots: changes of their page tables leave exactly once, their leases end after their last step."""

from scheduler_steps import PAGE, Steps, request

from headwater.cache.pins import PinBoard
from headwater.clock import ManualClock
from headwater.scheduling.request import Phase, Request
from headwater.scheduling.running import RunningRequests, Slots


class Setting:
    """Two slots over a real cache."""

    def __init__(self) -> None:
        self.cache = Steps().cache
        self.running = RunningRequests(self.cache, num_slots=2, pins=PinBoard(self.cache, ManualClock()))

    def enter(self, rid: str, *, first_id: int = 0, num_prompt_tokens: int = 2 * PAGE) -> Request:
        one = request(rid, num_prompt_tokens=num_prompt_tokens, first_id=first_id)
        lease = self.cache.acquire(one.namespace("w"), one.tokens, max_cached_tokens=len(one.tokens) - 1)
        pages = self.cache.extend(lease, -(-num_prompt_tokens // PAGE) - lease.num_pages)
        assert pages is not None
        one.enter(Phase.PREFILLING)
        self.running.enter(one, lease)
        return one

    def step(self, one: Request, *, step_id: int) -> None:
        self.running.launched([(one, len(one.tokens), True)], step_id)

    def updates(self, *requests: Request) -> list[tuple[int, int, list[int]]]:
        taken = self.running.take_page_updates([(each, 1, True) for each in requests])
        return [(update.slot, update.first, update.pages.tolist()) for update in taken]


def test_a_request_enters_with_its_whole_page_table():
    setting = Setting()
    one = setting.enter("a")
    assert setting.updates(one) == [(one.slot, 0, one.lease.page_table().tolist())]
    assert list(setting.running) == [one]
    assert len(setting.running) == 1


def test_page_updates_leave_once():
    """Sent twice they would undo what came after; not sent, the runner would read pages of another request."""
    setting = Setting()
    one = setting.enter("a")
    setting.updates(one)
    assert setting.running.extend(one)
    assert setting.updates(one) == [(one.slot, 2, one.lease.page_table().tolist()[2:])]
    assert setting.updates(one) == []


def test_updates_of_a_request_outside_the_plan_wait():
    setting = Setting()
    inside, outside = setting.enter("in"), setting.enter("out", first_id=100)
    assert [slot for slot, _, _ in setting.updates(inside)] == [inside.slot]
    assert [slot for slot, _, _ in setting.updates(outside)] == [outside.slot]


def test_a_request_that_comes_back_knows_nothing_of_the_slot_it_left():
    setting = Setting()
    one = setting.enter("a")
    setting.running.extend(one)
    setting.running.leave(one)
    one.enter(Phase.WAITING)
    again = setting.cache.acquire(one.namespace("w"), one.tokens, max_cached_tokens=0)
    assert setting.cache.extend(again, 2) is not None
    one.enter(Phase.PREFILLING)
    setting.running.enter(one, again)
    assert setting.updates(one) == [(one.slot, 0, again.page_table().tolist())]
    assert one.progress.last_step_id == -1


def test_a_launched_prompt_decodes_and_its_full_pages_are_shared_when_it_is_written():
    setting = Setting()
    one = setting.enter("a")
    assert setting.running.has_page_for_next_token(one)
    setting.step(one, step_id=0)
    assert one.phase is Phase.DECODING
    assert (one.progress.num_computed, one.progress.num_written, one.progress.num_launched_samples) == (8, 0, 1)
    assert not setting.running.has_page_for_next_token(one), "both pages are full"
    setting.running.publish(one)
    assert setting.cache.peek(one.namespace("w"), one.tokens.view()) == 0, "nothing of it is written"
    setting.running.collected(0)
    setting.running.written(one, 8)
    setting.running.publish(one)
    assert setting.cache.peek(one.namespace("w"), one.tokens.view()) == 8


def test_pages_of_a_request_that_left_are_in_use_until_its_last_step_is_collected():
    """Freed before, another request would get pages that the step still writes."""
    setting = Setting()
    num_free = setting.cache.num_available
    one = setting.enter("a")
    setting.step(one, step_id=3)
    setting.running.leave(one)
    assert setting.running.has_leaving_pages
    setting.running.collected(2)
    setting.running.release_leaving()
    assert setting.cache.num_available == num_free - 2
    setting.running.collected(3)
    setting.running.release_leaving()
    assert setting.cache.num_available == num_free
    assert not setting.running.has_leaving_pages
    assert len(setting.running) == 0


def test_a_result_of_an_earlier_use_belongs_to_no_request():
    """The step launched ahead may still bring a token for the request that had the slot before."""
    slots, first, second = Slots(1), request("first"), request("second")
    use = slots.enter(first)
    slot = first.slot
    assert slots.at(slot, use=use) is first
    slots.leave(first)
    assert slots.at(slot, use=use) is None
    later_use = slots.enter(second)
    assert (second.slot, later_use > use) == (slot, True)
    assert slots.at(slot, use=use) is None
    assert slots.at(slot, use=later_use) is second


def test_slots_are_full_with_the_last_one_and_distinct():
    slots = Slots(3)
    requests = [request(str(number)) for number in range(3)]
    for each in requests:
        assert not slots.is_full
        slots.enter(each)
    assert slots.is_full
    assert sorted(r.slot for r in requests) == [0, 1, 2]
    slots.leave(requests[1])
    assert not slots.is_full
    assert requests[1].slot == -1


def test_the_lowest_free_slot_is_taken_first():
    """A small batch stays in the first rows of the runner's state."""
    slots, one, two = Slots(4), request("one"), request("two")
    slots.enter(one)
    slots.enter(two)
    assert (one.slot, two.slot) == (0, 1)
