"""Publishes cache events on a zmq PUB socket, numbered, and repeats the last ones to those who missed them.

Three frames a batch: topic (empty), sequence number (8 bytes, big-endian, from 0), `EventBatch` in msgpack.
A replay is asked of a ROUTER socket with a sequence number and answered with every batch kept from there on,
each as number and batch, and at last the number -1 with an empty batch.
"""

import logging
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass

import zmq

from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.kv_events import EventBatch, encode_batch

_log = logging.getLogger(__name__)

_SEND_HWM = 100_000  # batches queued for one subscriber; beyond that it misses some, and sees it in the numbers
_POLL_MS = 100
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


@dataclass(frozen=True, slots=True)
class KvEventsSettings:
    """Where to publish, and how much to keep for replays."""

    endpoint: str
    replay_endpoint: str | None = None
    num_kept: int = 10_000  # batches
    rank: int = 0  # of this engine


class KvEventsPublisher:
    """Owns both sockets. `publish` belongs to the loop and never blocks; replays run in a thread of their own."""

    def __init__(self, recorder: KvEventsRecorder, settings: KvEventsSettings) -> None:
        """Binds at once. Raises `ValueError` that names the flag if an endpoint cannot be had."""
        self._recorder = recorder
        self._rank = settings.rank
        self._epoch = uuid.uuid4().hex
        self._next_number = 0
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=settings.num_kept)
        self._lock = threading.Lock()  # guards _kept
        self._is_stopping = False
        context = zmq.Context.instance()
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.SNDHWM, _SEND_HWM)
        _bind(self._socket, settings.endpoint, flag="--kv-events-endpoint")
        self._thread: threading.Thread | None = None
        if settings.replay_endpoint is not None:
            router = context.socket(zmq.ROUTER)
            router.setsockopt(zmq.LINGER, 200)
            _bind(router, settings.replay_endpoint, flag="--kv-events-replay-endpoint")
            self._thread = threading.Thread(target=self._serve_replays, args=(router,), daemon=True)
            self._thread.start()

    def publish(self) -> None:
        """Send what happened since the last call, if anything did."""
        events = self._recorder.take()
        if not events:
            return
        number = self._next_number.to_bytes(8, "big")
        self._next_number += 1
        batch = encode_batch(
            EventBatch(ts=time.time(), events=events, data_parallel_rank=self._rank, epoch=self._epoch)
        )
        with self._lock:
            self._kept.append((number, batch))
        try:
            self._socket.send_multipart((b"", number, batch), zmq.NOBLOCK)
        except zmq.Again:  # PUB drops by itself; should that change, the batch is still there to be replayed
            _log.warning("events %d were not sent", self._next_number - 1)

    def position(self) -> tuple[str, int]:
        """Epoch, and the number of the batch that will hold the next change; all earlier ones have been sent."""
        self.publish()
        return self._epoch, self._next_number

    def close(self) -> None:
        """Let go of the sockets. Waits for a replay under way to notice."""
        self._is_stopping = True
        if self._thread is not None:
            self._thread.join(timeout=2.0)
        self._socket.close()

    def _serve_replays(self, router: zmq.Socket) -> None:
        while not self._is_stopping:
            if not router.poll(_POLL_MS, zmq.POLLIN):
                continue
            frames = router.recv_multipart()
            client, request = frames[0], frames[-1]
            if len(request) != 8:
                _log.warning("a replay was asked with a number of %d bytes; it must have 8", len(request))
                continue
            with self._lock:
                wanted = [(number, batch) for number, batch in self._kept if number >= request]
            for number, batch in [*wanted, (END_OF_REPLAY, b"")]:
                router.send_multipart((client, b"", number, batch))
        router.close()


def endpoint_of(endpoint: str, rank: int) -> str:
    """The address of engine `rank`: the port, or the path, of the first one with the rank added."""
    if rank == 0:
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}.{rank}"
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + rank}"


def _bind(socket: zmq.Socket, endpoint: str, *, flag: str) -> None:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ValueError(f"{flag} {endpoint} cannot be listened on: {error}") from None
