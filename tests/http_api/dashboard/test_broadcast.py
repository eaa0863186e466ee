"""One source for all pages: what each gets, and that it costs nothing without them."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from headwater.generation.errors import ApiError
from headwater.http_api.dashboard import broadcast
from headwater.http_api.dashboard.broadcast import Broadcast
from headwater.http_api.dashboard.differences import patched

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Source:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.num_taken = 0

    async def take(self) -> dict[str, Any]:
        self.num_taken += 1
        return {"n": self.num_taken, "same": {"x": 1}}


def parsed(chunk: bytes) -> list[tuple[str, Any]]:
    found = []
    for event in chunk.decode().split("\n\n"):
        if event.startswith("event: "):
            name, data = event.split("\n", 1)
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def read(stream: AsyncGenerator[bytes], count: int) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    async with asyncio.timeout(20):
        while len(found) < count:
            found += parsed(await anext(stream))
    return found


async def test_a_page_gets_everything_once_and_then_differences() -> None:
    source = Source()
    hub = Broadcast(source.take, more=lambda: {"history": {"t": [1]}}, period_s=0.001)
    stream = hub.watch()
    (name, first), *rest = await read(stream, 4)
    assert (name, first["history"], first["snapshot"]["same"]) == ("whole", {"t": [1]}, {"x": 1})
    snapshot = first["snapshot"]
    for kind, change in rest:
        assert kind == "patch"
        assert change == {"n": snapshot["n"] + 1}
        snapshot = patched(snapshot, change)
    await stream.aclose()


async def test_pages_share_one_source_and_the_last_one_ends_it() -> None:
    source = Source()
    hub = Broadcast(source.take, period_s=0.002)
    assert source.num_taken == 0
    streams = [hub.watch() for _ in range(20)]
    begins = [(await read(stream, 1))[0][0] for stream in streams]
    assert set(begins) == {"whole"}
    assert hub.num_viewers == 20
    taken, loop = source.num_taken, asyncio.get_running_loop()
    since_s = loop.time()
    await asyncio.gather(*(read(stream, 5) for stream in streams))
    assert source.num_taken - taken <= 2 + (loop.time() - since_s) / 0.002, "asked for each page"
    for stream in streams:
        await stream.aclose()
    assert hub.num_viewers == 0
    taken = source.num_taken
    await asyncio.sleep(0.02)
    assert source.num_taken == taken, "it goes on without a page"


async def test_a_page_that_reads_too_slowly_gets_a_whole_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue is bounded: a tab in the background must not fill the server's memory."""
    source = Source()
    hub = Broadcast(source.take, period_s=0.001)
    slow, quick = hub.watch(), hub.watch()
    await read(slow, 1)
    await read(quick, 3 * broadcast.MAX_EVENTS)
    (name, event), *_ = parsed(await anext(slow))
    assert name == "whole"
    assert event["snapshot"]["n"] > broadcast.MAX_EVENTS
    (kind, change), *_ = await read(slow, 1)
    assert (kind, change["n"]) == ("patch", event["snapshot"]["n"] + 1)
    await slow.aclose()
    await quick.aclose()


async def test_a_failed_snapshot_ends_no_stream(caplog: pytest.LogCaptureFixture) -> None:
    source = Source()

    async def take() -> dict[str, Any]:
        if source.num_taken == 1:
            source.num_taken += 1
            raise RuntimeError("for the test")
        return await source.take()

    stream = Broadcast(take, period_s=0.001).watch()
    assert [event["n"] for _, event in (await read(stream, 3))[1:]] == [3, 4]
    assert "for the test" in caplog.text
    await stream.aclose()


async def test_a_stream_says_something_when_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in a long step answers late: proxies must not take the silence for the end."""
    monkeypatch.setattr(broadcast, "KEEP_ALIVE_S", 0.005)

    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    stream = Broadcast(never, period_s=0.001).watch()
    assert await anext(stream) == broadcast.KEEP_ALIVE
    await stream.aclose()


async def test_the_end_of_the_server_ends_the_streams() -> None:
    """Otherwise an open tab would hold up the shutdown."""
    source = Source()
    hub = Broadcast(source.take, has_ended=lambda: source.num_taken >= 3, period_s=0.001)
    async with asyncio.timeout(20):
        assert len([chunk async for chunk in hub.watch()]) >= 1


async def test_there_are_bounds_on_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "MAX_VIEWERS", 1)
    hub = Broadcast(Source().take, period_s=0.001)
    stream = hub.watch()
    await read(stream, 1)
    with pytest.raises(ApiError, match="open already"):
        await anext(hub.watch())
    await stream.aclose()
