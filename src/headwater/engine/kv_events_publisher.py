"""Publishes numbered batches of cache events on a zmq PUB socket, and repeats the last ones on request.

A batch has three frames: topic, sequence number (8 bytes, big-endian, from 0), `EventBatch` in msgpack. A subscriber
asks a ROUTER socket for a replay, with a sequence number. The answer has every kept batch from this number on, in the
same three frames, and ends with an empty topic, the number -1 and an empty batch.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import zmq

from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.kv_events import EventBatch, encode_batch, encode_batch_as_arrays
from headwater.messages.choices import KvEventsFormat

_log = logging.getLogger(__name__)

_SEND_HWM = 100_000  # batches queued for one subscriber; a slower one misses some, which the numbers show
_POLL_MS = 100
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


@dataclass(frozen=True, slots=True)
class KvEventsSettings:
    """Where to publish, and how many batches to keep for replays."""

    endpoint: str
    replay_endpoint: str | None = None
    num_kept: int = 10_000  # batches
    rank: int = 0  # of this engine
    topic: str = ""
    format: KvEventsFormat = "map"


class KvEventsPublisher:
    """Owns both sockets. The loop calls `publish`, which never blocks. Replays run in a thread of their own."""

    def __init__(self, recorder: KvEventsRecorder, settings: KvEventsSettings) -> None:
        """Binds both sockets. Raises `ValueError`, which names the flag, if an endpoint cannot be bound."""
        self._recorder = recorder
        self._rank = settings.rank
        self._topic = settings.topic.encode()
        self._encode = encode_batch if settings.format == "map" else encode_batch_as_arrays
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
        """Send the events since the last call, if there are any."""
        events = self._recorder.take()
        if not events:
            return
        number = self._next_number.to_bytes(8, "big")
        self._next_number += 1
        batch = self._encode(EventBatch(ts=time.time(), events=events, data_parallel_rank=self._rank))
        with self._lock:
            self._kept.append((number, batch))
        try:
            self._socket.send_multipart((self._topic, number, batch), zmq.NOBLOCK)
        except zmq.Again:  # PUB sockets drop instead; if this ever happens, the batch can still be replayed
            _log.warning("events %d were not sent", self._next_number - 1)

    def position(self) -> tuple[str, int]:
        """Epoch, and the number of the batch that will hold the next change; all earlier ones have been sent."""
        self.publish()
        return self._recorder.epoch, self._next_number

    def close(self) -> None:
        """Close the sockets. Waits up to two seconds for a replay in progress to end."""
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
                _log.warning("the sequence number of a replay request has %d bytes instead of 8", len(request))
                continue
            with self._lock:
                wanted = [(number, batch) for number, batch in self._kept if number >= request]
            for number, batch in wanted:
                router.send_multipart((client, b"", self._topic, number, batch))
            router.send_multipart((client, b"", b"", END_OF_REPLAY, b""))
        router.close()


def _bind(socket: zmq.Socket, endpoint: str, *, flag: str) -> None:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ValueError(f"{flag} {endpoint} cannot be listened on: {error}") from None
