"""What the answers of replicas to a flush add up to, and what is known of replicas: in its shortest form."""

import msgspec
import pytest

from headwater.client.change_call import Pending
from headwater.client.errors import CallFailed
from headwater.fleet.flush_round import settle
from headwater.fleet.replica import ClockOffset
from headwater.messages.control import Failed, FlushCache, FlushResult
from headwater.messages.two_phase import Prepare
from headwater.messages.weights import SetWeightVersion

FLUSH = FlushCache(call_id="f")
DONE = FlushResult(call_id="f", status=200, success=True, message="Cache flushed.", mode="idle", waited_s=0.0)


@pytest.mark.parametrize(("status", "owes"), [(400, False), (404, False), (499, False), (500, True), (503, True)])
def test_a_replica_that_failed_owes_the_flush_and_one_that_refused_does_not(status: int, owes: bool) -> None:
    """An error of its own says nothing about what it did: it may hold what the flush was to retire."""
    failed = CallFailed(Failed(call_id="f", status=status, message="no"))
    settled = settle(FLUSH, {0: DONE, 1: failed}, members=[0, 1])
    assert (1 in settled.owing) == owes
    assert isinstance(settled.answers[1], Pending) == owes
    assert settled.answers[0] is DONE


def test_of_a_flush_that_was_made_nowhere_nothing_is_owed() -> None:
    refused = msgspec.structs.replace(DONE, status=400, success=False)
    assert settle(FLUSH, {0: refused, 1: TimeoutError()}, members=[0, 1, 2]).owing == {}


def test_a_deadline_is_never_later_on_the_clock_of_a_replica() -> None:
    """Each answer bounds how far its clock is ahead, from below: the best bound counts, and never too large a one."""
    clock = ClockOffset()
    for travelled_s in (0.5, 0.001, 0.2):  # the replica's clock is 100 s ahead; the answer took this long
        clock.heard(their_s=150.0, our_s=50.0 + travelled_s)
    theirs = clock.theirs(60.0)
    assert theirs is not None and 159.99 < theirs <= 160.0
    prepare = Prepare(
        call_id="p", change=SetWeightVersion(call_id="c", weight_version="v", expires_at_s=60.0), expires_at_s=60.0
    )
    told = clock.translate(prepare)
    assert isinstance(told, Prepare) and told.expires_at_s == told.change.expires_at_s == theirs
