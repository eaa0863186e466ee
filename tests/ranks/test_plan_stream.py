"""The ring between an engine and its rank processes: order, the way round its end, back pressure, the writer's end."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from headwater.ranks.plan_stream import PlanStream, StreamReader, ring_bytes
from headwater.ranks.shared_memory import SharedMemory


@contextmanager
def streams(num_readers: int, *, largest_body: int = 4096) -> Iterator[tuple[PlanStream, list[StreamReader]]]:
    pipes = [os.pipe() for _ in range(num_readers)]
    size = ring_bytes(num_readers, largest_body=largest_body)
    memory = SharedMemory.create(size)
    writer = PlanStream(memory, [pipe[1] for pipe in pipes])
    readers = [
        StreamReader(SharedMemory(os.dup(memory.fd), size), pipes[index][0], index=index, num_readers=num_readers)
        for index in range(num_readers)
    ]
    try:
        yield writer, readers
    finally:
        for fds in pipes:
            for fd in fds:
                try:
                    os.close(fd)
                except OSError:
                    assert fd == fds[1], "only a test's end of the writer is closed before"


def test_all_readers_take_every_record_in_order_many_times_round_the_ring() -> None:
    """A wrong step over the ring's end, or a record that is overwritten before the slowest reader had it."""
    generator = np.random.default_rng(0)
    bodies = [generator.integers(0, 256, size, dtype=np.uint8).tobytes() for size in (0, 1, 900, 70_000, 500_000)]
    order = generator.integers(0, len(bodies), 200).tolist()
    with streams(3, largest_body=500_000) as (writer, readers):
        wrong: list[str] = []

        def read(reader: StreamReader) -> None:
            for number, which in enumerate(order):
                record = reader.take()
                assert record is not None
                if (record.kind, record.words[0], record.body.tobytes()) != (which, number, bodies[which]):
                    wrong.append(f"record {number}")

        threads = [threading.Thread(target=read, args=(reader,)) for reader in readers]
        for thread in threads:
            thread.start()
        for number, which in enumerate(order):
            writer.write(which, bodies[which], (number,))
        for thread in threads:
            thread.join(timeout=60)
        assert not wrong and not any(thread.is_alive() for thread in threads)


def test_a_writer_waits_for_the_slowest_reader_and_stops_waiting_when_it_has_died() -> None:
    class Lost(Exception):
        pass

    with streams(2) as (writer, readers):
        body = bytes(4096)
        num_checks = 0

        def check() -> None:
            nonlocal num_checks
            num_checks += 1
            if num_checks == 3:
                raise Lost

        def fill() -> None:
            for _ in range(2000):  # 8 MB: more than the ring
                writer.write(1, body)
                readers[0].take()

        writer._check = check
        with pytest.raises(Lost):
            fill()
        assert num_checks == 3


def test_a_reader_knows_what_it_has_carried_out_and_what_not() -> None:
    with streams(2) as (writer, readers):
        writer.write(1, b"a")
        writer.write(2, b"b")
        assert not any(writer.has_carried_out())
        first = readers[0].take()
        assert first is not None and first.kind == 1 and not writer.has_carried_out()[0]
        readers[0].take()
        assert not writer.has_carried_out()[0], "the second record is still being carried out"
        timer = threading.Timer(0.05, writer.write, (3, b"c"))  # the reader waits in its third `take`
        timer.start()
        third = readers[0].take()
        timer.join()
        assert third is not None and third.kind == 3


def test_the_end_of_the_writer_ends_the_readers() -> None:
    pipe = os.pipe()
    size = ring_bytes(1, largest_body=64)
    memory = SharedMemory.create(size)
    writer = PlanStream(memory, [pipe[1]])
    reader = StreamReader(SharedMemory(os.dup(memory.fd), size), pipe[0], index=0, num_readers=1)
    writer.write(1, b"last")
    os.close(pipe[1])
    assert reader.take() is not None
    assert reader.take() is None
    os.close(pipe[0])
    memory.close()


def test_a_record_too_large_for_the_ring_is_refused_with_its_size() -> None:
    with streams(1) as (writer, _), pytest.raises(ValueError, match="a command of 9000000 bytes exceeds"):
        writer.write(1, bytes(9_000_000))
