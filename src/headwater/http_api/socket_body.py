"""A large body, read by a thread from its connection's socket: gigabytes do not pass through the event loop.

In the loop each 256 KB would be an object, a call of the parser and a turn, and tokens would wait for all of them. The
thread reads into one buffer of its own and hands that on.
"""

import asyncio
import os
import select
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

EXTENSION = "headwater.socket_body"  # of the ASGI scope, where a body can be read so
LEAST_BYTES = 1 << 20
_PIECE_BYTES = 4 << 20
_LOOK_S = 0.5  # until the thread sees that it is to end
Headers = Sequence[tuple[bytes, bytes]]
Take = Callable[[memoryview], None]


class Begin(Protocol):
    def __call__(self, body: "SocketBody", /) -> tuple[asyncio.Transport, bytes]: ...


class End(Protocol):
    def __call__(self, *, is_whole: bool) -> None: ...


class BodyLost(Exception):
    """The sender left, or was refused meanwhile. The connection is of no more use."""


def plain_length(headers: Headers) -> int:
    """The length of a body that is sent as it is and is long enough; else 0."""
    found = dict(headers)
    length = found.get(b"content-length", b"")
    if b"transfer-encoding" in found or b"content-encoding" in found or b"upgrade" in found or not length.isdigit():
        return 0
    return int(length) if int(length) >= LEAST_BYTES else 0


class SocketBody:
    """The rest of one request's body. `read_into` once, and nothing else may read from the connection meanwhile."""

    def __init__(self, num_bytes: int, *, begin: Begin, end: End) -> None:
        """`begin` stops the loop's reading and returns the transport and what it has read so far."""
        self.num_bytes = num_bytes
        self._begin, self._end = begin, end
        self.num_read = 0
        self._is_left = threading.Event()

    async def read_into(self, take: Take) -> None:
        """Call `take` in a thread for each piece, valid until it returns. BodyLost if the sender leaves.

        If `take` raises, the rest is read and dropped first, so that the sender reads the answer.
        """
        transport, early = self._begin(self)
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        is_whole = False
        reading = asyncio.ensure_future(asyncio.to_thread(self._read, descriptor, early, take))
        try:
            error = await asyncio.shield(reading)
            is_whole = True
        except asyncio.CancelledError:
            self._is_left.set()
            await asyncio.wait([reading])
            raise
        finally:
            os.close(descriptor)
            self._end(is_whole=is_whole)
        if error is not None:
            raise error

    def leave(self) -> None:
        """The connection has ended: the thread is to end as well."""
        self._is_left.set()

    def _read(self, descriptor: int, early: bytes, take: Take) -> Exception | None:
        """The error of `take`."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        buffer = memoryview(bytearray(min(_PIECE_BYTES, self.num_bytes)))
        error = _given(memoryview(early), take, None) if early else None
        self.num_read = len(early)
        while left := self.num_bytes - self.num_read:
            piece = buffer[:left]
            self._fill(piece, descriptor, poll)
            error = _given(piece, take, error)
        return error

    def _fill(self, piece: memoryview, descriptor: int, poll: "select.poll") -> None:
        while piece:
            try:
                count = os.readv(descriptor, [piece])
            except BlockingIOError:
                if not poll.poll(_LOOK_S * 1000) and self._is_left.is_set():
                    raise BodyLost("the connection has ended") from None
                continue
            except OSError as lost:
                raise BodyLost(f"the connection broke: {lost.strerror}") from None
            if count == 0:
                raise BodyLost("the sender left before the body was whole")
            piece = piece[count:]
            self.num_read += count


def _given(piece: memoryview, take: Take, error: Exception | None) -> Exception | None:
    if error is not None:
        return error
    try:
        take(piece)
    except Exception as raised:  # noqa: BLE001  the caller gets it, when the sender can read an answer
        return raised
    return None
