"""One client's connection: uvicorn's protocol with bounds on what a client may send before and beside a request.

| a client that                                     | gets                                       |
|---------------------------------------------------|--------------------------------------------|
| sends headers or a URL over `max_header_bytes`    | 431, connection closed                     |
| sends over MAX_HEADERS headers                    | 431, connection closed                     |
| has not sent its headers after `header_timeout_s` | 408, connection closed                     |
| sends its body slower than MIN_BODY_BYTES_PER_S   | 408, connection closed                     |
| sends no further request for `keep_alive_s`       | connection closed                          |
| connects when `max_connections` are open          | the place of a waiting connection, or 503  |
| sends what is not HTTP                            | 400, connection closed                     |
| reads nothing of its answer for WRITE_STALL_S     | connection closed                          |

Answers are not bounded in time: a stream may last for hours.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from headwater.generation.errors import ApiError
from headwater.http_api.socket_body import EXTENSION, SocketBody, plain_length

MAX_HEADERS = 200
MAX_PIPELINED = 16  # requests sent ahead on one connection; clients of this API send none
FRAMING = frozenset({b"content-length", b"transfer-encoding"})  # headers of a request that has a body
BODY_GRACE_S = 20.0  # a body's time before its speed counts
MIN_BODY_BYTES_PER_S = 1024
LARGE_BODIES = frozenset({"/update_weights_from_tensor"})  # gigabytes
LARGE_PIECE_BYTES = 4 << 20
WRITE_STALL_S = 120.0  # a client's time to read the bytes that its connection holds, some 100 KB
LINGER_S = 1.0  # a refused client's time to read its answer; closed at once, many systems would discard it
LINGER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of a connection that no request can change."""

    max_connections: int = 1024
    max_header_bytes: int = 64 << 10
    header_timeout_s: float = 10.0
    keep_alive_s: float = 75.0  # longer than most clients and load balancers reuse a connection


class Refusal(NamedTuple):
    """Why a connection ends before its request is read."""

    status: int
    message: str
    code: str


class Stage(Enum):
    """What a connection is waiting for."""

    HEADERS = auto()  # of the first request, or of one that has begun
    BODY = auto()
    NOTHING = auto()  # a request was read: the server answers, or uvicorn's keep-alive runs
    REFUSED = auto()  # the client has yet to read the refusal


class Connections:
    """The open connections of a server, and those among them without a whole request, oldest first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.waiting: dict[Connection, None] = {}
        self.num_open = 0

    def make_room(self) -> bool:
        """Whether there is room for one more connection. If not, the oldest one without a whole request is closed.

        So clients that send nothing, or half a request, cannot keep others out.
        """
        if self.num_open < self.limits.max_connections:
            return True
        if not self.waiting:
            return False
        oldest = next(iter(self.waiting))
        del self.waiting[oldest]
        oldest.transport.abort()
        return True


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with the bounds above. uvicorn makes one for each connection."""

    def __init__(self, *args: Any, shared: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = shared  # by all connections of the server
        self.stage = Stage.HEADERS
        self._refusal: Refusal | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._num_unparsed = 0  # bytes of headers, or between pieces of a body, since the last whole one
        self._num_header_bytes = 0
        self._num_body_bytes = 0
        self._body_began_s = 0.0
        self._is_counted = False
        self._socket_body: SocketBody | None = None

    # --- the connection ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        has_room = self.shared.make_room()
        self.shared.num_open += 1
        self._is_counted = True
        super().connection_made(transport)
        if not has_room:
            refusal = Refusal(503, "too many connections; see --max-connections", "too_many_connections")
            self._refuse(refusal, linger=False)
            return
        self.shared.waiting[self] = None
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._stall is not None:
            self._stall.cancel()
        if self._socket_body is not None:
            self._socket_body.leave()
        self.shared.waiting.pop(self, None)
        if self._is_counted:
            self._is_counted = False
            self.shared.num_open -= 1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.stage is Stage.REFUSED:
            self._num_unparsed += len(data)
            if self._num_unparsed > LINGER_BYTES:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        self._num_unparsed += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            refusal = self._refusal or Refusal(400, f"this is not valid HTTP: {error}", "invalid_http")
            self._refuse(refusal)
            return
        if self._num_unparsed > self.shared.limits.max_header_bytes and self.stage is not Stage.NOTHING:
            self._refuse(self._headers_too_large())
            return
        if self.stage is Stage.NOTHING and not self._has_request():
            self._begin_headers()  # bytes, but no request yet: blank lines
        self._watch()  # only what did not arrive in one piece needs a timer

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:  # offered with a request, by Java's client for one: ignored
            self.cycle.keep_alive = False
            if self._has_body():
                head = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] in FRAMING)
                self.parser = httptools.HttpRequestParser(BodyOnly(self))
                self.parser.feed_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n" + data[upgrade.args[0] :])

    # --- calls of the parser ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_headers()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._stop_parsing(Refusal(431, f"a request may have at most {MAX_HEADERS} headers", "headers_too_large"))
        if self.stage is Stage.HEADERS:  # trailers after a body are counted, and not used
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._disarm()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_parsing(Refusal(503, f"at most {MAX_PIPELINED} requests may wait on a connection", "pipelined"))
        self.stage = Stage.BODY
        self._num_unparsed = self._num_body_bytes = 0
        self._body_began_s = self.loop.time()
        super().on_headers_complete()
        if self.scope["path"] in LARGE_BODIES and not self.pipeline:
            self._offer_socket()

    def on_body(self, body: bytes) -> None:
        self._num_unparsed = 0
        self._num_body_bytes += len(body)
        if self.scope["path"] not in LARGE_BODIES or self.cycle.response_complete:
            super().on_body(body)
            return
        self.cycle.body += body  # the route gets it in large pieces: each piece costs a turn of the event loop
        if len(self.cycle.body) > LARGE_PIECE_BYTES:
            self.flow.pause_reading()
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._has_body():
            return  # the parser thinks that the new protocol begins where the body does
        self._disarm()
        self.shared.waiting.pop(self, None)
        self._num_unparsed = 0
        self.stage = Stage.NOTHING
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.stage is not Stage.REFUSED and not self._has_request() and not self.transport.is_closing():
            self.shared.waiting[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(WRITE_STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    # --- bounds --------------------------------------------------------------------------------------

    def _offer_socket(self) -> None:
        """Let the route read the body from the socket, if its bytes are sent as they are."""
        num_bytes = plain_length(self.headers)
        if num_bytes and self.transport.get_extra_info("sslcontext") is None:
            body = SocketBody(num_bytes, begin=self._give_socket, end=self._take_socket_back)
            self.scope["extensions"] = {EXTENSION: body}  # type: ignore[typeddict-unknown-key]

    def _give_socket(self, body: SocketBody) -> tuple[asyncio.Transport, bytes]:
        """From now on the loop reads nothing of this connection: what it has read, and where the rest comes from."""
        self._socket_body, cycle = body, self.cycle
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        self.flow.pause_reading()
        early = bytes(cycle.body)
        assert len(early) == self._num_body_bytes, "the route has read a part"
        cycle.body = bytearray()
        return self.transport, early

    def _take_socket_back(self, *, is_whole: bool) -> None:
        self._socket_body = None
        if self.transport.is_closing() or self.stage is Stage.REFUSED:
            return
        if not is_whole:
            self.transport.abort()
            return
        if self.stage is Stage.BODY:  # the parser waits for bytes that it never saw
            self.parser = httptools.HttpRequestParser(self)
            self.on_message_complete()
        self.flow.resume_reading()

    def _begin_headers(self) -> None:
        self.stage = Stage.HEADERS
        self._num_header_bytes = 0
        if not self._has_request():
            self.shared.waiting[self] = None

    def _watch(self) -> None:
        if self._timer is not None:
            return
        if self.stage is Stage.HEADERS:
            self._arm(self.shared.limits.header_timeout_s, self._headers_late)
        elif self.stage is Stage.BODY:
            self._arm(BODY_GRACE_S, self._check_body)

    def _has_body(self) -> bool:
        return any(name in FRAMING and value != b"0" for name, value in self.headers)

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _count_header(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > self.shared.limits.max_header_bytes:
            self._stop_parsing(self._headers_too_large())

    def _headers_too_large(self) -> Refusal:
        most = self.shared.limits.max_header_bytes
        return Refusal(431, f"URL and headers may have at most {most} bytes", "headers_too_large")

    def _headers_late(self) -> None:
        self._timer = None
        seconds = self.shared.limits.header_timeout_s
        self._refuse(Refusal(408, f"the headers were not complete after {seconds:g} s", "headers_late"))

    def _check_body(self) -> None:
        """A body has BODY_GRACE_S, and more as it arrives. Time in which the server does not read does not count."""
        self._timer = None
        num_bytes = self._num_body_bytes if self._socket_body is None else self._socket_body.num_read
        left_s = self._body_began_s + BODY_GRACE_S + num_bytes / MIN_BODY_BYTES_PER_S - self.loop.time()
        if self.flow.read_paused and self._socket_body is None:
            left_s = max(left_s, BODY_GRACE_S)
        if left_s > 0:
            self._arm(left_s, self._check_body)
        else:
            message = f"the body came at less than {MIN_BODY_BYTES_PER_S} bytes a second"
            self._refuse(Refusal(408, message, "body_late"))

    def _arm(self, delay_s: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(delay_s, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_parsing(self, refusal: Refusal) -> None:
        """Called by the parser: what is raised ends its work, and `data_received` answers."""
        self._refusal = refusal
        raise ValueError(refusal.message)

    def _refuse(self, refusal: Refusal, *, linger: bool = True) -> None:
        """Answer, unless an earlier request's answer would be mistaken for it, and close."""
        is_reading = self.stage is Stage.BODY and not self.pipeline
        can_answer = not self._has_request() or (is_reading and not self.cycle.response_started)
        self._disarm()
        self._unset_keepalive_if_required()
        self.shared.waiting.pop(self, None)
        self.stage, self._num_unparsed = Stage.REFUSED, 0
        if self._socket_body is not None:
            self._socket_body.leave()
        if self.transport.is_closing():
            return
        if self._has_request():  # the route that reads the body, or answers, ends
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if can_answer:
            self.transport.write(answer_bytes(refusal))
        if can_answer and linger and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._arm(LINGER_S, self.transport.abort)
        else:
            self.transport.close()


class BodyOnly:
    """Facts of a request whose headers have been parsed."""

    def __init__(self, connection: Connection) -> None:
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete


def answer_bytes(refusal: Refusal) -> bytes:
    """A complete error answer in the usual shape, for clients whose request never reached the app."""
    error = ApiError(refusal.status, refusal.message, code=refusal.code)
    body = msgspec.json.encode(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in (headers | error.headers).items())
    return STATUS_LINE[refusal.status] + lines.encode() + b"\r\n" + body
