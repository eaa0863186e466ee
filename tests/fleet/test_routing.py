"""Which replica gets a request, by the text that it begins with."""

import json
from dataclasses import dataclass

import pytest

from headwater.client.prefix_routes import PrefixRoutes
from headwater.fleet.routing import choose_replica, routing_key

SYSTEM = {"role": "system", "content": "Answer in the manner of a harbour master. " * 10}


@dataclass
class Candidate:
    number: int
    num_running: int = 0

    @property
    def index(self) -> int:
        return self.number


def chat(*texts: str, **more: object) -> bytes:
    messages = [SYSTEM, *({"role": "user", "content": text} for text in texts)]
    return json.dumps({"messages": messages, "temperature": 0} | more).encode()


def test_a_conversation_returns_to_its_replica_and_others_go_where_less_runs() -> None:
    routes, candidates = PrefixRoutes(page_size=16), [Candidate(3), Candidate(5, num_running=1)]
    assert choose_replica(candidates, routing_key(chat("first")), routes).number == 3  # type: ignore[arg-type]
    candidates[0].num_running = 3
    again = choose_replica(candidates, routing_key(chat("first", "second")), routes)  # type: ignore[arg-type]
    assert again.number == 3
    other = json.dumps({"prompt": "something else entirely " * 20}).encode()
    assert choose_replica(candidates, routing_key(other), routes).number == 5  # type: ignore[arg-type]
    candidates[0].num_running = 9
    busy = choose_replica(candidates, routing_key(chat("first", "second")), routes)  # type: ignore[arg-type]
    assert busy.number == 5


@pytest.mark.parametrize("more", [{"cache_salt": "tenant"}, {"extra_key": "k"}, {"tools": [{"name": "other"}]}])
def test_what_the_cache_does_not_share_is_not_the_same_beginning(more: dict[str, object]) -> None:
    routes, candidates = PrefixRoutes(page_size=16), [Candidate(0), Candidate(1)]
    choose_replica(candidates, routing_key(chat("first")), routes)  # type: ignore[arg-type]
    candidates[0].num_running = 1
    assert choose_replica(candidates, routing_key(chat("first", **more)), routes).number == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("body", [b"", b"no json", b"[1]", b"{}", b'{"prompt": ""}', b'"\xff"'])
def test_a_body_without_a_prompt_has_no_key(body: bytes) -> None:
    assert routing_key(body) is None
