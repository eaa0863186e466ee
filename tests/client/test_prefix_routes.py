"""The map from beginnings of prompts to engines: what matches, what is bounded, what is forgotten."""

from types import SimpleNamespace

import pytest

from headwater.client.engine_choice import MAX_EXTRA_REQUESTS, choose_engine
from headwater.client.prefix_routes import MAX_DEPTH_PAGES, PrefixRoutes
from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate, RequestOptions, SamplingParams

PAGE = 4


def request(ids: list[int], **scope: str) -> Generate:
    return Generate(rid="r", prompt_ids=pack_ids(ids), sampling=SamplingParams(), options=RequestOptions(**scope))


def routes(**settings: int) -> PrefixRoutes:
    return PrefixRoutes(page_size=PAGE, **settings)


def test_the_longest_common_beginning_comes_first() -> None:
    known = routes()
    known.learn(request(list(range(100))), 0)
    known.learn(request([*range(16), *range(500, 600)]), 1)
    # 8 pages in common with the first prompt, 4 with the second
    assert known.known(request([*range(32), 7, 7, 7, 7])) == [{0}, {0, 1}, {0, 1}, {0, 1}]


@pytest.mark.parametrize("length", [0, 1, PAGE - 1])
def test_less_than_a_page_is_no_beginning(length: int) -> None:
    known = routes()
    known.learn(request(list(range(1, length + 1))), 0)
    assert len(known) == 0


def test_another_first_token_shares_nothing() -> None:
    known = routes()
    known.learn(request(list(range(64))), 0)
    assert known.known(request([9, *range(1, 64)])) == []


def test_namespaces_do_not_share_routes() -> None:
    """Their KV cannot be shared; and salt and key must not run into each other."""
    known = routes()
    prompt = list(range(16))
    known.learn(request(prompt, cache_salt="a", extra_key="b"), 0)
    assert known.known(request(prompt, cache_salt="a", extra_key="b", lora_name="c")) == []
    for scope in ({}, {"cache_salt": "a"}, {"extra_key": "b"}, {"cache_salt": "ab"}, {"cache_salt": "b"}):
        assert known.known(request(prompt, **scope)) == []
    assert known.known(request(prompt, cache_salt="a", extra_key="b"))[0] == {0}


def test_an_engine_that_lost_its_cache_is_forgotten_and_no_other() -> None:
    known = routes()
    prompt, other = request(list(range(16))), request(list(range(100, 116)))
    known.learn(prompt, 0)
    known.learn(prompt, 3)
    known.learn(other, 0)
    known.forget(0)
    assert known.known(prompt)[0] == {3}
    assert known.known(other) == []
    known.clear()
    assert len(known) == 0


def test_the_map_is_bounded_and_keeps_what_was_used_last() -> None:
    known = routes(max_entries=30)
    first = request(list(range(16)))
    for number in range(100):
        known.learn(first, 0)
        known.learn(request(list(range(1000 * number, 1000 * number + 16))), 1)
        assert len(known) <= 30
    assert known.known(first)[0] == {0, 1} or known.known(first)[0] == {0}
    assert known.known(request(list(range(1000, 1016)))) == []


def test_a_very_long_prompt_costs_a_dozen_entries() -> None:
    known = routes()
    known.learn(request(list(range(PAGE * MAX_DEPTH_PAGES * 4))), 0)
    assert len(known) == 11


@pytest.mark.parametrize(("num_running", "chosen"), [(MAX_EXTRA_REQUESTS, 1), (MAX_EXTRA_REQUESTS + 1, 0)])
def test_an_engine_that_knows_the_prompt_may_be_busier_by_a_few_requests(num_running: int, chosen: int) -> None:
    engines = [SimpleNamespace(index=0, num_running=0), SimpleNamespace(index=1, num_running=num_running)]
    assert choose_engine(engines, [{1}]).index == chosen
