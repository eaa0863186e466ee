"""The engine's end of the sockets: one ROUTER that all API processes talk to, one frame a message."""

import logging
import math
from typing import Protocol

import msgspec
import zmq

from headwater.messages.wire import ToClient, ToEngine, decode_to_engine, encode

_POLLIN, _SNDMORE = int(zmq.POLLIN), int(zmq.SNDMORE)  # operations of the enums take as long as those of the socket
_log = logging.getLogger(__name__)


class Wire(Protocol):
    """Messages in and out. `client` is the sender of a message, and the receiver of an answer."""

    def receive(self, *, wait_s: float) -> list[tuple[bytes, ToEngine]]:
        """The messages that have arrived; waits up to `wait_s` for one."""
        ...

    def send(self, client: bytes, message: ToClient) -> None: ...

    def close(self) -> None:
        """Close the sockets after the messages sent have left."""
        ...


class ZmqWire:
    """A ROUTER socket bound to `endpoint`. Used by the loop's thread only."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(endpoint)

    def receive(self, *, wait_s: float) -> list[tuple[bytes, ToEngine]]:
        received: list[tuple[bytes, ToEngine]] = []
        if wait_s > 0 and not self._socket.poll(math.ceil(wait_s * 1000), zmq.POLLIN):
            return received
        while self._socket.get(zmq.EVENTS) & _POLLIN:
            client, frame = self._socket.recv_multipart(zmq.NOBLOCK)
            try:
                received.append((client, decode_to_engine(frame)))
            except msgspec.DecodeError as error:
                _log.error("dropped a message that is not of this version: %s", error)
        return received

    def send(self, client: bytes, message: ToClient) -> None:
        self._socket.send(client, _SNDMORE)
        self._socket.send(encode(message))

    def close(self) -> None:
        self._socket.close()
