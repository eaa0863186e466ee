"""Long answers: streams of events or lines, and work that ends when its client disconnects."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from headwater.generation.errors import ApiError, ClientLeft, as_api_error
from headwater.http_api.error_handlers import error_response
from headwater.http_api.middleware import UNWRAPPED_SEND

log = logging.getLogger(__name__)
T = TypeVar("T")

JSON = "application/json"
STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or a stream of events.", "content": {JSON: {}, "text/event-stream": {}}},
    400: {"description": "A parameter is invalid; `error.param` names it."},
    429: {"description": "The queue is full, or the key runs too many requests; see `Retry-After`."},
    503: {"description": "The model is loading, the server shuts down, the engine is gone, or the wait was too long."},
    504: {"description": "The request took longer than `--request-timeout`."},
}

DONE = b"data: [DONE]\n\n"
EVENTS = b"text/event-stream; charset=utf-8"


def event(payload: object, *, name: str | None = None) -> bytes:
    """One server-sent event holding JSON; `name` is its kind, for APIs that name them."""
    kind = b"" if name is None else b"event: " + name.encode() + b"\n"
    return kind + b"data: " + msgspec.json.encode(payload) + b"\n\n"


@dataclass(frozen=True, slots=True)
class StreamForm:
    """The form of a stream. A stream that fails ends with `error_end`, any other with `end`."""

    error: Callable[[ApiError], bytes]  # the last event of a stream that fails
    end: bytes = b""
    error_end: bytes = b""
    content_type: bytes = EVENTS

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", self.content_type),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # proxies that know the header forward each event at once
        ]


def _error_event(error: ApiError) -> bytes:
    return event(error.event())


NATIVE_STREAM = StreamForm(error=_error_event, end=DONE, error_end=DONE)
# no [DONE] after an error: clients that look for it alone would take it for success
OPENAI_STREAM = StreamForm(error=_error_event, end=DONE)


class EventStream(Response):
    """Sends the events of an asynchronous generator, then the end of `form`; calls `close` whatever happens.

    If the generator raises before its first event, the answer is that error with its own status. If it raises later,
    the stream ends with an error event. A client that disconnects ends the stream.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], *, close: Callable[[], None], form: StreamForm = NATIVE_STREAM
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._close = close
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._send_all(scope, receive, send), receive)
        except ClientLeft:
            log.debug("the client of a stream left")
        finally:
            self._close()  # a generator that never began would not run its own clean-up
            await self._events.aclose()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(self._events, b"")
        except Exception as error:  # noqa: BLE001 - the client gets an answer in any case
            await error_response(described(error))(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self._form.headers})
        send = scope.get(UNWRAPPED_SEND, send)
        await send(_part(first))
        end = self._form.end
        try:
            async for piece in self._events:
                await send(_part(piece))
        except Exception as error:  # noqa: BLE001 - as above, inside the stream
            end = self._form.error(described(error)) + self._form.error_end
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled (and awaited) when the client disconnects. Raises ClientLeft.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return await task
    finally:
        for unfinished in (task, watching):
            if not unfinished.done():
                unfinished.cancel()
        await asyncio.gather(task, watching, return_exceptions=True)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def described(error: Exception) -> ApiError:
    """The answer for any exception. A bug is logged, and its answer has no details."""
    answer = as_api_error(error)
    if answer is None:
        log.error("a stream failed", exc_info=error)
        answer = ApiError(500, "internal error; the server's log has the details", code="internal")
    return answer
