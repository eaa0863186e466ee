"""How many requests of one key may generate at the same time."""

import pytest

from headwater.generation.concurrency import Account, Permit
from headwater.generation.errors import ApiError


def test_a_request_counts_once_however_many_answers_it_generates():
    account = Account(max_running=1)
    permit = Permit(account)
    for _ in range(3):
        permit.open()
    assert account.num_running == 1
    permit.close()
    permit.close()
    with pytest.raises(ApiError):
        Permit(account).open()
    permit.close()
    assert (account.num_running, account.num_refused) == (0, 1)
    Permit(account).open()
    assert account.num_running == 1


def test_a_refusal_says_when_a_place_should_be_free():
    account = Account(max_running=2)
    for _ in range(2):
        Permit(account).open()
    with pytest.raises(ApiError) as refused:
        Permit(account).open()
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
    account.leave(20.0)
    Permit(account).open()
    with pytest.raises(ApiError) as refused:
        Permit(account).open()
    assert refused.value.headers["Retry-After"] == "10", "two places, each free every 20 s"
    account.leave(1000.0)
    Permit(account).open()
    with pytest.raises(ApiError) as refused:
        Permit(account).open()
    assert refused.value.headers["Retry-After"] == "60"


def test_without_a_limit_none_is_refused():
    account = Account()
    for _ in range(100):
        Permit(account).open()
    assert account.num_running == 100
