"""A large body, moved by a thread from its connection's socket to a file: gigabytes do not pass through this process.

In the event loop each 256 KB would be an object, a call of the parser and a turn, and tokens would wait for all of
them. The kernel moves them instead, through a pipe (https://man7.org/linux/man-pages/man2/splice.2.html).
"""

import asyncio
import contextlib
import fcntl
import os
import select
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

EXTENSION = "headwater.socket_body"  # of the ASGI scope, where a body can be read so
LEAST_BYTES = 1 << 20
_PIPE_BYTES = 1 << 20  # what Linux gives any user
_LOOK_S = 0.5  # until the thread sees that it is to end
Headers = Sequence[tuple[bytes, bytes]]


class Sink(Protocol):
    """Where a body goes. Both calls append, in a thread."""

    def write(self, data: bytes) -> None: ...

    def splice_from(self, pipe: int, num_bytes: int) -> None:
        """So many bytes, which the pipe holds."""
        ...


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
    return int(length) if int(length) >= LEAST_BYTES and hasattr(os, "splice") else 0


class SocketBody:
    """The rest of one request's body. `read_into` once, and nothing else may read from the connection meanwhile."""

    def __init__(self, num_bytes: int, *, begin: Begin, end: End) -> None:
        """`begin` stops the loop's reading and returns the transport and what it has read so far."""
        self.num_bytes = num_bytes
        self._begin, self._end = begin, end
        self.num_read = 0
        self._is_left = threading.Event()

    async def read_into(self, sink: Sink) -> None:
        """Move the whole body. BodyLost if the sender leaves.

        If the sink raises, the rest is read and dropped first, so that the sender reads the answer.
        """
        transport, early = self._begin(self)
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        own_thread = ThreadPoolExecutor(1, "body")  # slow senders take no thread of others
        reading = asyncio.get_running_loop().run_in_executor(own_thread, self._read, descriptor, early, sink)
        is_whole = False
        try:
            error = await asyncio.shield(reading)
            is_whole = True
        except asyncio.CancelledError:
            self._is_left.set()
            await asyncio.wait([reading])
            raise
        finally:
            own_thread.shutdown(wait=False)
            os.close(descriptor)
            self._end(is_whole=is_whole)
        if error is not None:
            raise error

    def leave(self) -> None:
        """The connection has ended: the thread is to end as well."""
        self._is_left.set()

    def _read(self, descriptor: int, early: bytes, sink: Sink) -> Exception | None:
        """The error of the sink."""
        pipe_out, pipe_in = os.pipe()
        try:
            with contextlib.suppress(OSError):  # a user has so many pages for all pipes
                fcntl.fcntl(pipe_in, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            return self._move(descriptor, early, sink, pipe_out, pipe_in)
        finally:
            os.close(pipe_out)
            os.close(pipe_in)

    def _move(self, descriptor: int, early: bytes, sink: Sink, pipe_out: int, pipe_in: int) -> Exception | None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        try:
            self.num_read = len(early)
            if early:
                sink.write(early)
            while left := self.num_bytes - self.num_read:
                count = self._next(poll, lambda: os.splice(descriptor, pipe_in, min(left, _PIPE_BYTES)))
                self.num_read += count
                sink.splice_from(pipe_out, count)
        except BodyLost:
            raise
        except Exception as error:  # noqa: BLE001  the caller gets it, when the sender can read an answer
            while left := self.num_bytes - self.num_read:
                self.num_read += self._next(poll, lambda: len(os.read(descriptor, min(left, _PIPE_BYTES))))
            return error
        return None

    def _next(self, poll: "select.poll", read: Callable[[], int]) -> int:
        """How many bytes came."""
        while not self._is_left.is_set():
            try:
                count = read()
            except BlockingIOError:
                poll.poll(_LOOK_S * 1000)
                continue
            except OSError as lost:
                raise BodyLost(f"the connection broke: {lost.strerror}") from None
            if count == 0:
                raise BodyLost("the sender left before the body was whole")
            return count
        raise BodyLost("the connection has ended")
