"""Bodies sent with `Content-Encoding: gzip`, read within the bound on a body's size. Other encodings are a 415."""

import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headwater.generation.errors import ApiError
from headwater.http_api.error_handlers import error_response
from headwater.http_api.middleware import body_too_large, drain

GZIP = frozenset({"gzip", "x-gzip"})
GZIP_WBITS = 31
MAX_MEMBERS = 16  # a gzip body may have several members; thousands of empty ones only cost time
ABOUT_THE_BODY = frozenset({b"content-encoding", b"content-length"})  # of the compressed body


class CompressedBody:
    """Gives the app the decompressed body."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = _encoding(scope)
        if not encoding:
            await self.app(scope, receive, send)
            return
        if encoding not in GZIP:
            await drain(receive)
            message = f"a body must be sent as it is, or with content-encoding gzip; got {encoding!r}"
            error = ApiError(415, message, code="unsupported_encoding", headers={"Accept-Encoding": "gzip"})
            await error_response(error)(scope, receive, send)
            return
        inflater = Inflater(max_bytes=self.max_body_bytes)

        async def inflated_receive() -> Message:
            message = await receive()
            if message["type"] != "http.request":
                return message
            is_last = not message.get("more_body", False)
            return {**message, "body": inflater.feed(message.get("body", b""), is_last=is_last)}

        headers = [header for header in scope["headers"] if header[0] not in ABOUT_THE_BODY]
        try:
            await self.app({**scope, "headers": headers}, inflated_receive, send)
        except ApiError as error:  # raised above while a route outside of the error handlers read the body
            await error_response(error)(scope, receive, send)


class Inflater:
    """Decompresses a body as it arrives, up to `max_bytes`."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = self._left_bytes = max_bytes
        self._member = zlib.decompressobj(GZIP_WBITS)
        self._num_members = 1

    def feed(self, data: bytes, *, is_last: bool) -> bytes:
        """The decompressed `data`. Raises ApiError: 413 beyond the bound, 400 if it is not gzip or is truncated."""
        pieces = []
        try:
            while data:
                if self._member.eof:
                    self._next_member()
                piece = self._member.decompress(data, self._left_bytes + 1)
                self._left_bytes -= len(piece)
                if self._left_bytes < 0:
                    raise body_too_large(self._max_bytes)
                pieces.append(piece)
                data = self._member.unused_data or self._member.unconsumed_tail
        except zlib.error as error:
            raise _not_gzip(str(error)) from None
        if is_last and not self._member.eof:
            raise _not_gzip("it ends too early")
        return b"".join(pieces)

    def _next_member(self) -> None:
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise _not_gzip(f"more than {MAX_MEMBERS} parts")
        self._member = zlib.decompressobj(GZIP_WBITS)


def _encoding(scope: Scope) -> str:
    if scope["type"] != "http":
        return ""
    encoding = Headers(scope=scope).get("content-encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def _not_gzip(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid gzip: {reason}", code="invalid_encoding")
