"""Sends requests for text to a replica, and its answer back as it comes. Without an answer another one is tried.

A request that reached a replica and got no answer may be what ended that replica. So it is tried on one other replica,
and on no third.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from headwater.fleet.client import FleetClient
from headwater.fleet.replica import Replica
from headwater.fleet.responses import PATH, IdReader, ResponseOwners, asked_for, not_there
from headwater.fleet.routing import choose_replica, routing_key
from headwater.generation.errors import ApiError
from headwater.http_api.error_handlers import error_response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

HOLD_S = 30.0  # for a replica that serves, before a request is refused
_POLL_S = 0.1
BUSY, GONE, BREAKS = "no_replica", "engine_gone", "request_broke_replicas"  # codes of errors
BROKEN_OUTCOMES = RETRIED, GIVEN_UP = "retried", "given_up"
MAX_BROKEN = 2  # replicas that one request may reach without an answer
_OF_ONE_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host".split()
)
log = logging.getLogger(__name__)


class Answer(Protocol):
    """A replica's answer from its status and headers on. Reading `chunks` raises OSError if the rest never comes."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Headers: ...
    def chunks(self) -> AsyncIterator[bytes]: ...


class NotConnected(ConnectionError):
    """Nothing of a request was sent."""


class Forward(Protocol):
    """Sends a request to a replica's server. Raises OSError if no answer begins: NotConnected if it was not sent."""

    def __call__(
        self, method: str, url: str, *, headers: Headers, body: bytes
    ) -> AbstractAsyncContextManager[Answer]: ...


class ClientLeft(Exception):
    """The client has closed its connection."""


@dataclass(slots=True)
class Proxy:
    """An ASGI application. Belongs to the event loop of `client`."""

    client: FleetClient
    forward: Forward
    responses: ResponseOwners = field(default_factory=ResponseOwners)
    num_open: int = 0  # requests that have no whole answer yet, those that wait for a replica included
    count_broken: Callable[[str], None] = lambda outcome: None  # one of BROKEN_OUTCOMES

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            body = await read_body(receive)
            self.num_open += 1
            try:
                await unless_left(self._answer(scope, body, send), receive)
            finally:
                self.num_open -= 1
        except ClientLeft:
            log.debug("a client left")
        except ApiError as error:
            await error_response(error)(scope, receive, send)

    async def _answer(self, scope: Message, body: bytes, send: Send) -> None:
        key = routing_key(body) if scope["method"] == "POST" else None
        until_s = asyncio.get_running_loop().time() + HOLD_S
        tries = _Tries()
        response = asked_for(scope["method"], scope["path"], body)
        while candidates := await self._candidates(tries, response, until_s=until_s):
            replica = choose_replica(candidates, key, self.client.routes)
            if tries.broken and not tries.is_retried:
                tries.is_retried = True
                self.count_broken(RETRIED)
            if await self._try(replica, scope, body, send, tries=tries, is_last=len(candidates) == 1):
                return
            if len(tries.broken) == MAX_BROKEN:
                self.count_broken(GIVEN_UP)
                raise _breaks(tries.broken)
        raise tries.why

    async def _candidates(
        self, tries: "_Tries", response: tuple[str, str] | None, *, until_s: float
    ) -> list[Replica]:
        """Waits for one: a fleet that is being brought in step, or replaced, delays requests and loses none.

        Of a request about a `response`, only the replica that gave it is one. ApiError 404 if that one has left.
        """
        owner = None if response is None else self.responses.of(response[0])
        while True:
            if response is not None and owner is not None and not self.client.stays(owner):
                raise not_there(*response)
            if owner in tries.broken:
                return []
            candidates = self.client.candidates()
            left = [each for each in candidates if tries.may_take(each.number) and owner in (None, each.number)]
            if left or asyncio.get_running_loop().time() >= until_s:
                return left
            await asyncio.sleep(_POLL_S)
            tries.tried.clear()  # a connection may break that was good, and a replica that was fenced comes back

    async def _try(
        self, replica: Replica, scope: Message, body: bytes, send: Send, *, tries: "_Tries", is_last: bool
    ) -> bool:
        """Whether the client has its answer; else `tries` knows why there is none. 503 is an answer if it `is_last`."""
        tries.tried.add(replica.number)
        query = scope["query_string"].decode("latin-1")
        raw_path = scope.get("raw_path") or scope["path"].encode()
        url = f"{replica.beat.url}{raw_path.decode('latin-1').partition('?')[0]}{'?' if query else ''}{query}"
        left_out = _OF_ONE_CONNECTION | {b"content-length"}  # a body that came compressed is plain now
        headers = [(name, value) for name, value in scope["headers"] if name not in left_out]
        replica.num_running += 1
        has_begun = False
        try:
            async with AsyncExitStack() as stack:
                async with replica.while_there(begins=True):
                    sent = self.forward(scope["method"], url, headers=headers, body=body)
                    answer = await stack.enter_async_context(sent)
                if answer.status == 503 and not is_last:
                    tries.why = ApiError(503, f"replica {replica.number} takes no requests now", code=BUSY)
                    return False
                has_begun = True
                gives_id = scope["method"] == "POST" and scope["path"] == PATH and answer.status == 200
                await _pass_on(answer, replica, send, learn=self.responses.learn if gives_id else None)
                return True
        except OSError as error:
            if has_begun:
                raise
            self.client.suspect(replica)
            if not isinstance(error, NotConnected):
                tries.broken.append(replica.number)
            text = f"replica {replica.number} cannot be reached: {str(error) or 'it is silent'}"
            tries.why = ApiError(503, text, code=GONE)
            return False
        finally:
            replica.num_running -= 1


@dataclass(slots=True)
class _Tries:
    """Where one request has been. `broken`: replicas that it reached, and that gave no answer."""

    tried: set[int] = field(default_factory=set)
    broken: list[int] = field(default_factory=list)
    is_retried: bool = False  # after it has broken
    why: ApiError = field(default_factory=lambda: ApiError(503, "no replica takes requests now", code=BUSY))

    def may_take(self, number: int) -> bool:
        return number not in self.tried and number not in self.broken


def _breaks(numbers: list[int]) -> ApiError:
    """OpenAI's and Anthropic's clients would send the request again, which the header forbids."""
    names = " and ".join(map(str, numbers))
    text = f"replicas {names} took this request and gave no answer. It may be what ended them, so no other one gets it"
    return ApiError(502, text, code=BREAKS, type="engine_error", headers={"x-should-retry": "false"})


async def _pass_on(answer: Answer, replica: Replica, send: Send, *, learn: Callable[[str, int], None] | None) -> None:
    """`learn` takes the id of the response that is passed on, and the number of the replica."""
    ids = IdReader()
    left_out = _OF_ONE_CONNECTION | {b"x-request-id"}  # the front sets its own
    headers = [(name, value) for name, value in answer.headers if name.lower() not in left_out]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    try:
        async with replica.while_there():
            async for chunk in answer.chunks():
                if learn is not None and (id := ids.read(chunk)) is not None:
                    learn(id, replica.number)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except OSError:
        if not any(name.lower() == b"content-type" and b"event-stream" in value for name, value in headers):
            raise  # the connection breaks, so the client sees that the answer is incomplete
        await send({"type": "http.response.body", "body": _broken(replica), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _broken(replica: Replica) -> bytes:
    message = f"replica {replica.number} has ended in the middle of the answer"
    error = {"message": message, "type": "engine_error", "param": None, "code": GONE}
    return b"data: " + msgspec.json.encode({"error": error}) + b"\n\n"


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises ClientLeft."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def unless_left(work: Any, receive: Receive) -> Any:
    """The result of `work`, which ends when the client leaves. Raises ClientLeft."""
    task, watching = asyncio.ensure_future(work), asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return await task
    finally:
        for each in (task, watching):
            each.cancel()
        await asyncio.gather(task, watching, return_exceptions=True)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
