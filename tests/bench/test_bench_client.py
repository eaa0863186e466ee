"""The load generator's client against a server that streams by script: bytes, APIs, troubles."""

import asyncio
import time
from typing import Any

import pytest
from scripted_streams import StreamScript, scripted_streams

from headwater.bench.apis import APIS, Settings
from headwater.bench.connection import ConnectionBroke, HttpClient
from headwater.bench.event_stream import EventSplitter
from headwater.bench.exchange import Exchange, Watched, exchange

SETTINGS = Settings("scripted")


def ask(
    script: StreamScript, api: str, *, num_tokens: int = 5, count: int = 1, timeout_s: float = 30.0
) -> list[Exchange]:
    async def run() -> list[Exchange]:
        http = HttpClient(script.url)
        prompt: Any = [{"role": "user", "content": "a b c"}] if api == "chat" else "a b c"
        body = APIS[api].body(prompt, num_tokens, SETTINGS)
        found = []
        for _ in range(count):
            found.append(
                await exchange(http, APIS[api], body, due_s=time.perf_counter(), timeout_s=timeout_s, watched=Watched())
            )
        http.close()
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("closes", [False, True])
def test_every_api_counts_what_it_was_sent(api: str, closes: bool) -> None:
    with scripted_streams(num_cached=2, closes=closes) as script:
        first, second = ask(script, api, count=2)
        assert not first.error and not second.error
        assert script.num_connections == (2 if closes else 1), "a kept connection is used again"
    assert (second.told.num_output_tokens, second.num_events, len(second.gaps_s)) == (5, 5, 4)
    assert second.told.num_cached_tokens == 2
    assert second.told.num_prompt_tokens > 0
    assert second.told.text == " a" * 5
    assert second.due_s <= second.sent_s <= second.first_s <= second.last_s <= second.ended_s


def test_several_tokens_in_an_event_are_counted_by_the_usage() -> None:
    with scripted_streams(tokens_per_event=2) as script:
        (found,) = ask(script, "chat", num_tokens=6)
        (native,) = ask(script, "generate", num_tokens=6)
    assert (found.told.num_output_tokens, found.num_events) == (6, 3)
    assert (native.told.num_output_tokens, native.num_events) == (6, 3)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ({"refuses": 503}, "503: not today"),
        ({"breaks_after": 2}, "broke within an answer"),
        ({"breaks_after": 2, "closes": True}, "ended before its answer"),
        ({"error_after": 2}, "the engine ended"),
        ({"first_s": 30.0}, "did not answer within 0.2 s"),
    ],
)
def test_a_request_that_fails_says_why(api: str, trouble: dict[str, Any], says: str) -> None:
    """Half an answer that counts as a short one would make a broken server look fast."""
    with scripted_streams(**trouble) as script:
        (found,) = ask(script, api, timeout_s=0.2 if "first_s" in trouble else 30.0)
    assert says in found.error


def test_a_connection_that_the_server_closed_while_idle_is_opened_again() -> None:
    async def run(script: StreamScript) -> None:
        http = HttpClient(script.url)
        await http.request("GET", "/v1/models", timeout_s=10)
        kept = http._idle[-1]
        assert kept._transport is not None
        kept._transport.abort()
        await asyncio.sleep(0)
        assert (await http.request("GET", "/v1/models", timeout_s=10)).status == 200
        http.close()

    with scripted_streams() as script:
        asyncio.run(run(script))
        assert script.num_connections == 2


def test_no_server_is_a_sentence() -> None:
    async def run() -> None:
        await HttpClient("http://127.0.0.1:9").request("GET", "/", timeout_s=5)

    with pytest.raises(ConnectionBroke, match="no server answers at http"):
        asyncio.run(run())


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://x", "http://", "http://x:port"])
def test_a_malformed_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address like"):
        HttpClient(url)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_events_survive_any_cut(size: int) -> None:
    text = b': hi\n\ndata: {"a": 1}\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]\n\n'
    splitter = EventSplitter()
    found = [event for at in range(0, len(text), size) for event in splitter.feed(text[at : at + size])]
    assert found == [b'{"a": 1}', b"two\nlines", b"[DONE]"]


def test_the_client_costs_little() -> None:
    """64 streams on two cores must leave the server its time. `benchmarks/serving/client_cost.py` measures it."""

    async def run(script: StreamScript) -> int:
        http = HttpClient(script.url)
        body = APIS["chat"].body([{"role": "user", "content": "a"}], 200, SETTINGS)
        calls = (exchange(http, APIS["chat"], body, due_s=0.0, timeout_s=60, watched=Watched()) for _ in range(16))
        done = await asyncio.gather(*calls)
        http.close()
        return sum(each.told.num_output_tokens for each in done)

    with scripted_streams() as script:
        began_s = time.thread_time()  # the server runs in a thread of its own
        num_tokens = asyncio.run(run(script))
        spent_us = 1e6 * (time.thread_time() - began_s) / num_tokens
    assert num_tokens == 3200
    assert spent_us < 150, spent_us
