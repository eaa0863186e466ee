"""The HTTP server: uvicorn with bounded connections. It survives running out of file descriptors."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from headwater.http_api.connection import Connection, ConnectionLimits, Connections

ACCEPTED_AT_ONCE = 32  # per turn of the event loop; four turns of it must fit into the descriptors that are left free
QUEUE = 2048  # connections that the system holds until we accept them; further clients retry after a second
OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
COMPLAIN_EVERY_S = 10.0

log = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: a signal ends the whole server, not just its HTTP side."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits, **settings: Any) -> None:
        """`settings` are those of `uvicorn.Config`."""
        self.connections = Connections(limits)
        protocol: Any = partial(Connection, shared=self.connections)
        keep_alive: Any = limits.keep_alive_s  # declared as an int, passed to the loop as it is
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="on",
            backlog=ACCEPTED_AT_ONCE,
            timeout_keep_alive=keep_alive,
            log_config=None,
            **settings,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(AcceptErrors())
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)


class AcceptErrors:
    """An exception handler of the event loop: logs a line from time to time when file descriptors have run out.

    The loop retries every second, and by itself would log a traceback for each connection that it cannot accept.
    """

    def __init__(self) -> None:
        self._complained_s: float | None = None

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        is_ours = isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS and "socket" in context
        if not is_ours:
            loop.default_exception_handler(context)
        elif self._complained_s is None or loop.time() - self._complained_s >= COMPLAIN_EVERY_S:
            self._complained_s = loop.time()
            log.error("cannot accept connections: %s; trying again every second", error)
