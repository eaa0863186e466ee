"""Slots and their use counts, by which late results are told from present ones."""

from scheduler_steps import request

from headwater.scheduling.slots import Slots


def test_a_result_of_an_earlier_use_belongs_to_nobody():
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
