"""Steps before every route: a request id, a check of the web page that sends it, a bound on the body.

Plain ASGI: cheap per chunk.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headwater.generation.errors import ApiError
from headwater.http_api.error_handlers import error_response
from headwater.http_api.monitoring.request_record import RECORD, RequestRecord
from headwater.http_api.sites import SitePolicy

MAX_REQUEST_ID_CHARS = 256
DRAIN_BYTES = 64 << 20  # of a refused body: most clients read no answer before they have sent it all
DRAIN_S = 10.0
PREFLIGHT = "access-control-request-method"
MAX_LOGGED = 20  # refused web pages that the log reports
OnEnded = Callable[[RequestRecord], None]  # is called when a request has ended
log = logging.getLogger(__name__)
# A key of the scope: `send` as it is below the layers of middleware and routing. They look at the start of an answer
# alone, so a stream sends the rest past them: in a profile each layer took 2 to 4 % of an event.
UNWRAPPED_SEND = "headwater.unwrapped_send"


class RequestId:
    """Returns the X-Request-ID of the request, or a new one, and reports each request when it has ended."""

    def __init__(self, app: ASGIApp, *, on_ended: Sequence[OnEnded] = ()) -> None:
        self.app = app
        self._on_ended = on_ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given[:MAX_REQUEST_ID_CHARS] or uuid.uuid4().hex.encode()

        record = RequestRecord(request_id.decode("latin-1"), scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        scope[UNWRAPPED_SEND] = send
        scope[RECORD] = record
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            for ended in self._on_ended:
                ended(record)


class BodyLimit:
    """Answers 413 to a body over the limit, whether its length is announced or not.

    `unbounded`: content types by path whose routes count the bytes themselves.
    """

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, unbounded: Mapping[str, Collection[str]] = MappingProxyType({})
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.unbounded = unbounded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-type", "").partition(";")[0].strip().lower() in self.unbounded.get(scope["path"], ()):
            await self.app(scope, receive, send)
            return
        announced = headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > self.max_body_bytes:
            if headers.get("expect", "").lower() != "100-continue":
                await drain(receive)
            await error_response(body_too_large(self.max_body_bytes))(scope, receive, send)
            return
        num_bytes = 0

        async def counted_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                await drain(receive)
                raise body_too_large(self.max_body_bytes)
            return message

        try:
            await self.app(scope, counted_receive, send)
        except ApiError as error:  # raised above while a route outside of the error handlers read the body
            await error_response(error)(scope, receive, send)


def body_too_large(max_body_bytes: int) -> ApiError:
    return ApiError(413, f"the body must not be larger than {max_body_bytes} bytes", code="body_too_large")


async def drain(receive: Receive) -> None:
    """Read and drop the rest of a body, within bounds."""
    num_bytes = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while num_bytes < DRAIN_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                num_bytes += len(message.get("body", b""))
    except TimeoutError:
        return


class SiteGuard:
    """Answers 403 to pages of other sites and to foreign names.

    The page's browser shows little of this, so the log names once for each page the flag that would admit it.
    """

    def __init__(self, app: ASGIApp, *, policy: SitePolicy) -> None:
        self.app = app
        self.policy = policy
        self._told: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            method = scope["method"]
            refusal = self.policy.refusal(method, scope["path"], headers)
            if method == "OPTIONS":  # a browser asks for permission; an answer without CORS headers refuses it
                self._tell(self.policy.refusal(headers.get(PREFLIGHT, method), scope["path"], headers))
            elif refusal is not None:
                self._tell(refusal)
                await error_response(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _tell(self, refusal: ApiError | None) -> None:
        if refusal is not None and refusal.message not in self._told and len(self._told) < MAX_LOGGED:
            self._told.add(refusal.message)
            log.warning("refused: %s", refusal.message)
