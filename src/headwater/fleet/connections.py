"""HTTP to the replicas' servers, with aiohttp: the only module that knows it."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# types are checked where Ray is not installed

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from headwater.fleet.proxy import Answer, Headers, NotConnected
from headwater.http_api.control.replica_routes import CLOCK_HEADER

_CONNECT_S = 2.0


class Connections:
    """Kept open between requests. Belongs to one event loop."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, float]:
        """Status, body, and the clock of the host that answered. Raises OSError."""
        try:
            async with self._open().post(url, data=body, headers=headers) as answer:
                return answer.status, await answer.read(), float(answer.headers.get(CLOCK_HEADER, "0"))
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error) or type(error).__name__) from None

    @asynccontextmanager
    async def forward(self, method: str, url: str, *, headers: Headers, body: bytes) -> AsyncIterator[Answer]:
        """See `Forward`."""
        named = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        try:
            sent = await self._open().request(method, url, data=body or None, headers=named, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise NotConnected(str(error) or type(error).__name__) from None
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error) or type(error).__name__) from None
        try:
            yield _Answer(sent)
        finally:
            sent.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Content-Type"),
                cookie_jar=aiohttp.DummyCookieJar(),
                max_line_size=1 << 20,
                max_field_size=1 << 20,
            )
        return self._session


class _Answer:
    def __init__(self, sent: aiohttp.ClientResponse) -> None:
        self._sent = sent

    @property
    def status(self) -> int:
        return self._sent.status

    @property
    def headers(self) -> Headers:
        return list(self._sent.raw_headers)

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._sent.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error) or type(error).__name__) from None
