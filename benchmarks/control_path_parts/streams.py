"""Streams of a chat, read with as little work as possible: the client shares the cores with the server."""

import json
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

SKIPPED_EVENTS = 8  # at both ends: prefill, and streams that end before others


@dataclass(slots=True)
class Stream:
    """A connection with one request on it, and when its events came."""

    connection: socket.socket
    came_ns: list[int] = field(default_factory=list)
    has_ended: bool = False
    tail: bytes = b""

    def read(self) -> None:
        data = self.connection.recv(1 << 16)
        now_ns = time.monotonic_ns()
        text = self.tail + data
        self.came_ns += [now_ns] * text.count(b"\ndata: {")
        self.has_ended |= not data or b"data: [DONE]" in text
        self.tail = text[-len(b"data: [DONE]") :].rpartition(b"\ndata: {")[2]


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which all streams ran, and what `snapshot` said at its ends."""

    began_ns: int
    ended_ns: int
    before: object
    after: object
    came_ns: tuple[int, ...]  # of the events within


def run_streams(port: int, *, num_streams: int, num_tokens: int, temperature: float, snapshot: Callable) -> Window:
    """Generate with `num_streams` at once, `num_tokens` each."""
    streams = [Stream(_ask(port, number, num_tokens, temperature)) for number in range(num_streams)]
    before, began_ns, after, ended_ns = None, 0, None, 0
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.connection, selectors.EVENT_READ, stream)
        while not all(stream.has_ended for stream in streams):
            for key, _ in selector.select(timeout=60):
                key.data.read()
                if key.data.has_ended:
                    selector.unregister(key.data.connection)
            if before is None and min(len(it.came_ns) for it in streams) > SKIPPED_EVENTS:
                before, began_ns = snapshot(), time.monotonic_ns()
            if after is None and max(len(it.came_ns) for it in streams) > num_tokens * 3 // 4:
                after, ended_ns = snapshot(), time.monotonic_ns()
    for stream in streams:
        stream.connection.close()
    if before is None or after is None:
        raise RuntimeError(f"too few events: {[len(it.came_ns) for it in streams]}, {streams[0].tail!r}")
    came_ns = sorted(at for stream in streams for at in stream.came_ns if began_ns < at <= ended_ns)
    return Window(began_ns, ended_ns, before, after, tuple(came_ns))


def _ask(port: int, number: int, num_tokens: int, temperature: float) -> socket.socket:
    body = {
        "messages": [{"role": "user", "content": f"Write a long story about the number {number}."}],
        "max_tokens": num_tokens,
        "temperature": temperature,
        "seed": number,
        "ignore_eos": True,
        "stream": True,
    }
    encoded = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(encoded)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + encoded)
    return connection
