"""HTTP/1.1 for a load generator: kept connections, a parser in C, and the moment at which each piece arrived.

A general client costs several times as much for each event of a stream, and would itself be measured.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

CONNECT_TIMEOUT_S = 10.0
OnBody = Callable[[bytes, float], None]  # a piece of the body, and when it came (`time.perf_counter`)


class ConnectionBroke(Exception):
    """The server could not be reached, or ended the connection within an answer. The message is for the user."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of an answer. `text` is the body, unless it was handed out in pieces."""

    status: int
    text: str


class HttpClient:
    """Connections to one server, kept open between requests. Belongs to one event loop; close it at the end."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        """`key` is sent as a bearer token. Raises ValueError for a malformed URL."""
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            self._host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ValueError(f"{url} is not an address like http://127.0.0.1:30000: {error}") from None
        if parts.scheme not in ("http", "https") or not self._host:
            raise ValueError(f"{url} is not an address like http://127.0.0.1:30000")
        self._is_tls = parts.scheme == "https"
        self._tls: ssl.SSLContext | None = None
        self.port = port or (443 if self._is_tls else 80)
        self._base = parts.path
        auth = f"Authorization: Bearer {key}\r\n" if key else ""
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\n{auth}Content-Type: application/json\r\n"
        self._idle: list[_Connection] = []

    @property
    def is_on_this_machine(self) -> bool:
        return self._host in ("127.0.0.1", "::1", "localhost")

    async def request(
        self, method: str, path: str, body: bytes = b"", *, on_body: OnBody | None = None, timeout_s: float
    ) -> Answer:
        """One exchange. With `on_body`, the body of a 200 is handed out in pieces instead of being kept.

        Raises ConnectionBroke, also when the whole answer takes longer than `timeout_s`.
        """
        wants = "text/event-stream" if on_body is not None else "application/json"
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}Accept: {wants}\r\nContent-Length: {len(body)}\r\n"
        data = head.encode() + b"\r\n" + body
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(data, on_body)
        except TimeoutError:
            raise ConnectionBroke(f"{self.url}{path} did not answer within {timeout_s:g} s") from None

    async def _exchange(self, data: bytes, on_body: OnBody | None) -> Answer:
        while True:
            is_reused = bool(self._idle)
            connection = self._idle.pop() if is_reused else await self._connect()
            try:
                answer = await connection.exchange(data, on_body)
            except _ClosedBeforeAnswer:
                if is_reused:  # the server closed it while it was idle
                    continue
                raise ConnectionBroke(f"{self.url} closed the connection without an answer") from None
            except ConnectionBroke as error:
                raise ConnectionBroke(f"{self.url}: {error}") from None
            if connection.is_open:
                self._idle.append(connection)
            return answer

    async def _connect(self) -> "_Connection":
        if self._is_tls and self._tls is None:
            self._tls = ssl.create_default_context()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(_Connection, self._host, self.port, ssl=self._tls)
        except TimeoutError:
            raise ConnectionBroke(f"{self.url} took no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise ConnectionBroke(f"no server answers at {self.url}: {error.strerror or error}") from None
        return connection

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class _ClosedBeforeAnswer(Exception):
    pass


class _Connection(asyncio.Protocol):
    """One connection; one exchange at a time. The parser calls the methods that begin with `on_`."""

    def __init__(self) -> None:
        self.is_open = True
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._forget()

    def _forget(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._on_body: OnBody | None = None
        self._kept: list[bytes] = []
        self._has_begun = self._has_length = False
        self._now_s = 0.0

    async def exchange(self, data: bytes, on_body: OnBody | None) -> Answer:
        """Send a request. Raises _ClosedBeforeAnswer if it can be sent again, else ConnectionBroke."""
        if not self.is_open:
            raise _ClosedBeforeAnswer
        self._forget()
        self._on_body = on_body
        self._done = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(data)
        try:
            return await self._done
        except BaseException:  # also a deadline: the rest of the answer would be read as the next one
            self.close()
            raise
        finally:
            self._done = None

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    # --- asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
            self._fail(ConnectionBroke(f"the answer is not readable: {cause or error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._has_begun and not self._has_length and exc is None:
            self._finish()  # the end of the connection is the end of the body
        else:
            broke = ConnectionBroke("the connection broke within an answer")
            self._fail(broke if self._has_begun else _ClosedBeforeAnswer())

    # --- the parser's calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._has_begun = True
        if self._parser.get_status_code() != 200:
            self._on_body = None

    def on_body(self, body: bytes) -> None:
        if self._on_body is None:
            self._kept.append(body)
        else:
            self._on_body(body, self._now_s)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            text = b"".join(self._kept).decode("utf-8", "replace")
            self._done.set_result(Answer(self._parser.get_status_code(), text))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
