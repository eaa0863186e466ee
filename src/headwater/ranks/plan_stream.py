"""The plan stream: one engine writes commands into shared memory, and every rank process reads all of them in order.

A ring of records, each a header of 16 int64 and a body. A byte in a reader's pipe announces a record, so the system
orders the reader's loads after the writer's stores, and the end of the pipe is the end of the writer.
"""

import mmap
import os
import select
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.ranks.shared_memory import SharedMemory
from headwater.ranks.step_progress import Position

NUM_WORDS = 14  # of a header that commands fill
_HEADER = struct.Struct(f"<{2 + NUM_WORDS}q")
_PADS = [(0,) * (NUM_WORDS - num) for num in range(NUM_WORDS + 1)]  # by words filled
_SIZE = struct.Struct("<2q")
_ALIGNMENT = 128
_POSITION_BYTES = 128  # a reader's position, last sign of life and steps have a cache line of their own
_SKIP = -1  # instead of a kind: the rest of the ring is unused, the next record is at its start
_SPIN_S = 50e-6  # a step's plan follows the last one soon; longer waits leave the core to other processes
_FULL_POLL_S = 50e-6


@dataclass(frozen=True, slots=True)
class Record:
    """A command as it was written: copies, which their reader may keep."""

    kind: int
    words: tuple[int, ...]  # NUM_WORDS
    body: npt.NDArray[np.uint8]


def ring_bytes(num_readers: int, *, largest_body: int) -> int:
    """Bytes of memory for records of at most `largest_body` bytes: two of them fit, and many of an ordinary step's."""
    return num_readers * _POSITION_BYTES + 2 * _whole(largest_body) + (2 << 20)


def _whole(body_bytes: int) -> int:
    """Bytes of a record in the ring."""
    return -(-(_HEADER.size + body_bytes) // _ALIGNMENT) * _ALIGNMENT


class _Ring:
    """The layout of the memory: a position for each reader, then the records."""

    def __init__(self, memory: SharedMemory, num_readers: int) -> None:
        self.start = num_readers * _POSITION_BYTES
        self.capacity = (memory.num_bytes - self.start) // _ALIGNMENT * _ALIGNMENT
        positions = np.frombuffer(memory.buffer, dtype=np.int64, count=self.start // 8)
        self.positions: npt.NDArray[np.int64] = positions[:: _POSITION_BYTES // 8]
        self.seen_ns: npt.NDArray[np.int64] = positions[1 :: _POSITION_BYTES // 8]  # on CLOCK_MONOTONIC
        self.num_ended: npt.NDArray[np.int64] = positions[2 :: _POSITION_BYTES // 8]  # steps
        self.num_launched: npt.NDArray[np.int64] = positions[3 :: _POSITION_BYTES // 8]

    def offset(self, position: int) -> int:
        """Where in the memory the record at a position of the stream begins."""
        return self.start + position % self.capacity


class PlanStream:
    """The writer. `wake_fds`: the writing end of each reader's pipe, which this object does not close."""

    def __init__(
        self, memory: SharedMemory, wake_fds: Sequence[int], *, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` is called while the ring is full; it raises if a reader will never go on."""
        self._ring = _Ring(memory, len(wake_fds))
        self._start, self._capacity = self._ring.start, self._ring.capacity
        self._buffer = memory.buffer
        self._wake_fds = tuple(wake_fds)
        self._check = check
        self._position = 0  # bytes written since the start
        self._room = self._capacity  # the position that all readers leave room for
        num_pages = -(-memory.num_bytes // mmap.PAGESIZE)
        self._buffer[:: mmap.PAGESIZE] = bytes(num_pages)  # else the first write to each takes a page fault

    @property
    def largest_body(self) -> int:
        return self._capacity // 2 - _ALIGNMENT - _HEADER.size

    def write(self, kind: int, body: bytes, words: tuple[int, ...] = ()) -> None:
        """Hand a record to all readers. Waits for those that lag behind by a whole ring."""
        self.write_parts(kind, (body,), num_bytes=len(body), words=words)

    def write_parts(self, kind: int, parts: Sequence[Any], *, num_bytes: int, words: tuple[int, ...]) -> None:
        """As `write`, of a body whose parts, buffers all, have `num_bytes` together."""
        header = array("q", (kind, num_bytes, *words, *_PADS[len(words)]))  # not by `struct`: less code to fetch, twice
        record = b"".join((header, *parts))
        assert len(record) == _HEADER.size + num_bytes
        position, size = self._position, len(record) + _ALIGNMENT - 1 & -_ALIGNMENT
        offset = position % self._capacity
        if offset + size > self._capacity or position + size > self._room:
            position = self._make_room(num_bytes, size)
            offset = position % self._capacity
        at = self._start + offset
        self._buffer[at : at + len(record)] = record
        self._position = position + size
        for fd in self._wake_fds:
            try:  # noqa: SIM105  `suppress` costs a microsecond
                os.write(fd, b"\0")
            except BrokenPipeError:  # its process has died, which the answers' pipe reports
                pass

    def _make_room(self, num_bytes: int, size: int) -> int:
        """Where a record of `size` bytes begins, `num_bytes` of them the body, once no reader needs that place."""
        if num_bytes > self.largest_body:
            raise ValueError(f"a command of {num_bytes} bytes exceeds the plan stream's {self.largest_body}")
        position, left = self._position, self._capacity - self._position % self._capacity
        begin = position + left if size > left else position
        while begin + size > (room := int(self._ring.positions.min()) + self._capacity):
            self._check()
            time.sleep(_FULL_POLL_S)
        self._room = room
        if begin > position:
            _SIZE.pack_into(self._buffer, self._ring.offset(position), _SKIP, 0)
        return begin

    def has_carried_out(self) -> list[bool]:
        """For each reader, whether it has carried out every record."""
        return (self._ring.positions >= self._position).tolist()

    def signs_of_life(self) -> list[int]:
        """For each reader, the moment of its last one, in nanoseconds of CLOCK_MONOTONIC; 0 before its first."""
        return self._ring.seen_ns.tolist()

    def steps(self) -> list[Position]:
        """Of each reader, as it last showed."""
        return list(zip(self._ring.num_ended.tolist(), self._ring.num_launched.tolist(), strict=True))


class StreamReader:
    """Reader `index` of a stream: takes records in the order they were published."""

    def __init__(self, memory: SharedMemory, wake_fd: int, *, index: int, num_readers: int) -> None:
        self._ring = _Ring(memory, num_readers)
        self._buffer = memory.buffer
        self._index = index
        self._wake_fd = wake_fd
        self._poll = select.poll()
        self._poll.register(wake_fd, select.POLLIN)
        self._position = 0
        self._num_announced = 0

    def take(self) -> Record | None:
        """The next record, when it is there; None at the end of the stream. The one before it has been carried out."""
        ring = self._ring
        ring.positions[self._index] = self._position  # its bytes may be written again
        if not self._num_announced:
            self._num_announced = self._wait()
            if not self._num_announced:
                return None
        self._num_announced -= 1
        if _SIZE.unpack_from(self._buffer, ring.offset(self._position))[0] == _SKIP:
            self._position += ring.capacity - self._position % ring.capacity
        at = ring.offset(self._position)
        kind, num_bytes, *words = _HEADER.unpack_from(self._buffer, at)
        body = np.frombuffer(self._buffer, dtype=np.uint8, count=num_bytes, offset=at + _HEADER.size).copy()
        self._position += _whole(num_bytes)
        return Record(kind, tuple(words), body)

    def show_life(self, steps: Position = (0, 0)) -> None:
        """Called every second or so by a thread that runs while the reader works: a stopped process does not."""
        self._ring.num_ended[self._index], self._ring.num_launched[self._index] = steps
        self._ring.seen_ns[self._index] = time.monotonic_ns()

    def _wait(self) -> int:
        """How many records have been announced, at least one; 0 if the writer has gone."""
        spin_until_s = time.perf_counter() + _SPIN_S
        while not self._poll.poll(0):
            if time.perf_counter() > spin_until_s:
                self._poll.poll()
        return len(os.read(self._wake_fd, 4096))
