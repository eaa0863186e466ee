"""The way of a request through the front: to a replica that answers, and never to none without saying so."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from replicas import SimulatedFleet, SimulatedReplica

from headwater.fleet import proxy as proxy_module
from headwater.fleet import watching
from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.fleet.proxy import GIVEN_UP, RETRIED, Answer, NotConnected, Proxy

pytestmark = pytest.mark.anyio
STREAM = [(b"Content-Type", b"text/event-stream"), (b"Transfer-Encoding", b"chunked"), (b"X-Request-ID", b"theirs")]


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"loop_factory": VirtualLoop}


class Servers:
    """The replicas' HTTP side. `refusing`: nothing listens; `busy`: answers 503; `breaking`: ends after a chunk;
    `dying`: ends before its answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.refusing: set[str] = set()
        self.busy: set[str] = set()
        self.breaking: set[str] = set()
        self.dying: set[str] = set()
        self.silent: set[str] = set()  # no answer begins
        self.stuck: set[str] = set()  # the first chunk comes, and no other
        self.has_ended = False

    @asynccontextmanager
    async def forward(self, method: str, url: str, *, headers: Any, body: bytes) -> AsyncIterator[Answer]:
        name = url.removeprefix("http://").partition("/")[0]
        self.asked.append(name)
        self.headers = headers
        if name in self.refusing:
            raise NotConnected("refused")
        if name in self.dying:
            raise ConnectionResetError("reset")
        if name in self.silent:
            await asyncio.Event().wait()
        try:
            yield ScriptedAnswer(503 if name in self.busy else 200, name in self.breaking, name in self.stuck)
        finally:
            self.has_ended = True


class ScriptedAnswer:
    def __init__(self, status: int, is_breaking: bool, is_stuck: bool) -> None:
        self.status = status
        self.headers = STREAM
        self._is_breaking, self._is_stuck = is_breaking, is_stuck

    async def chunks(self) -> AsyncIterator[bytes]:
        yield b"data: one\n\n"
        if self._is_stuck:
            await asyncio.Event().wait()
        if self._is_breaking:
            raise ConnectionResetError("reset")
        yield b"data: [DONE]\n\n"


async def request(proxy: Proxy, body: dict[str, Any], *, leaves: bool = False) -> tuple[int, bytes, dict[bytes, bytes]]:
    sent: list[Any] = []
    received = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if received:
            return received.pop()
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
        "headers": [(b"host", b"front"), (b"authorization", b"Bearer k"), (b"content-length", b"9")],
    }  # fmt: skip
    await proxy(scope, receive, send)
    if not sent:
        return 0, b"", {}
    headers = {name.lower(): value for name, value in sent[0]["headers"]}
    return sent[0]["status"], b"".join(each["body"] for each in sent[1:]), headers


@pytest.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    async with SimulatedFleet(SimulatedReplica("a"), SimulatedReplica("b")) as fleet:
        yield fleet


async def test_an_answer_is_passed_on_without_what_belongs_to_its_connection(fleet: SimulatedFleet) -> None:
    servers = Servers()
    status, body, headers = await request(Proxy(fleet.client, servers.forward), {"prompt": "hello"})
    assert (status, body) == (200, b"data: one\n\ndata: [DONE]\n\n")
    assert list(headers) == [b"content-type"]
    assert servers.headers == [(b"authorization", b"Bearer k")]


async def test_a_request_that_met_no_answer_goes_to_another_replica(fleet: SimulatedFleet) -> None:
    for trouble in ("refusing", "busy"):
        servers = Servers()
        setattr(servers, trouble, {"a"})
        status, _, _ = await request(Proxy(fleet.client, servers.forward), {"prompt": "hello"})
        assert status == 200 and servers.asked == ["a", "b"]


async def test_without_any_answer_the_client_gets_an_error(
    fleet: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "HOLD_S", 0.0)
    servers = Servers()
    servers.refusing = {"a", "b"}
    status, body, _ = await request(Proxy(fleet.client, servers.forward), {"prompt": "hello"})
    assert status == 503 and json.loads(body)["error"]["code"] == "engine_gone"
    assert all(replica.num_running == 0 for replica in fleet.client.replicas.values())


async def test_a_connection_that_broke_once_does_not_fail_a_request() -> None:
    async with SimulatedFleet(SimulatedReplica("a")) as fleet:
        servers = Servers()
        servers.refusing = {"a"}
        asking = asyncio.create_task(request(Proxy(fleet.client, servers.forward), {"prompt": "hello"}))
        await fleet.until(lambda: servers.asked)
        servers.refusing = set()
        assert (await asking)[0] == 200


async def test_a_request_that_ends_its_replicas_ends_two_of_them_and_no_third() -> None:
    async with SimulatedFleet(*(SimulatedReplica(name) for name in "abcd")) as fleet:
        servers, outcomes = Servers(), []
        servers.dying = {"a", "b", "c", "d"}
        proxy = Proxy(fleet.client, servers.forward, count_broken=outcomes.append)
        status, body, headers = await request(proxy, {"prompt": "hello"})
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (502, "request_broke_replicas") and "replicas 0 and 1" in error["message"]
        assert headers[b"x-should-retry"] == b"false"
        assert servers.asked == ["a", "b"] and outcomes == [RETRIED, GIVEN_UP]


async def test_a_request_that_broke_is_retried_once_past_replicas_that_it_cannot_reach() -> None:
    async with SimulatedFleet(*(SimulatedReplica(name) for name in "abcd")) as fleet:
        servers, outcomes = Servers(), []
        servers.dying, servers.refusing, servers.busy = {"a"}, {"b"}, {"c"}
        proxy = Proxy(fleet.client, servers.forward, count_broken=outcomes.append)
        assert (await request(proxy, {"prompt": "hello"}))[0] == 200
        assert servers.asked == ["a", "b", "c", "d"] and outcomes == [RETRIED]


async def test_a_request_never_comes_back_to_a_replica_that_it_broke(
    fleet: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "HOLD_S", 0.3)
    servers = Servers()
    servers.dying, servers.refusing = {"a"}, {"b"}
    status, body, _ = await request(Proxy(fleet.client, servers.forward), {"prompt": "hello"})
    assert status == 503 and json.loads(body)["error"]["code"] == "engine_gone"
    assert servers.asked.count("a") == 1 and servers.asked.count("b") > 1


async def test_the_last_replica_that_is_busy_says_so_itself(fleet: SimulatedFleet) -> None:
    servers = Servers()
    servers.busy = {"a", "b"}
    status, body, _ = await request(Proxy(fleet.client, servers.forward), {"prompt": "hello"})
    assert status == 503 and body.startswith(b"data: one") and servers.asked == ["a", "b"]


async def test_a_request_to_a_replica_that_fell_silent_goes_to_another(
    fleet: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "ANSWER_S", 0.2)
    monkeypatch.setattr(watching, "LOST_S", 0.2)
    servers = Servers()
    servers.silent = {"a"}
    fleet.replicas["a"].is_silent = True
    status, _, _ = await request(Proxy(fleet.client, servers.forward), {"prompt": "hello"})
    assert status == 200 and servers.asked == ["a", "b"]


async def test_a_stream_of_a_replica_that_left_ends_though_its_connection_does_not(fleet: SimulatedFleet) -> None:
    servers = Servers()
    servers.stuck = {"a", "b"}
    asking = asyncio.create_task(request(Proxy(fleet.client, servers.forward), {"prompt": "hello"}))
    await fleet.until(lambda: servers.asked == ["a"])
    fleet.replicas["a"].is_dead = True  # its host, for example
    status, body, _ = await asking
    assert status == 200 and b"engine_gone" in body and servers.has_ended


async def test_a_stream_that_breaks_ends_with_an_error_event(fleet: SimulatedFleet) -> None:
    servers = Servers()
    servers.breaking = {"a", "b"}
    status, body, _ = await request(Proxy(fleet.client, servers.forward), {"prompt": "hello"})
    assert status == 200 and b"[DONE]" not in body
    last = json.loads(body.removesuffix(b"\n\n").rpartition(b"data: ")[2])
    assert last["error"]["code"] == "engine_gone"
    assert len(servers.asked) == 1  # what has begun is not begun anew


async def test_a_client_that_leaves_ends_its_request_on_the_replica(fleet: SimulatedFleet) -> None:
    servers = Servers()

    @asynccontextmanager
    async def endless(method: str, url: str, **more: Any) -> AsyncIterator[Answer]:
        async with servers.forward(method, url, **more) as answer:
            await asyncio.Event().wait()
            yield answer

    status, _, _ = await request(Proxy(fleet.client, endless), {"prompt": "hello"}, leaves=True)
    assert status == 0 and servers.has_ended
    assert all(replica.num_running == 0 for replica in fleet.client.replicas.values())
