"""Memory of a running server: collections, and a heap that does not grow with the requests."""

import ctypes
import gc
import subprocess
import sys
import weakref

import pytest

from headwater.heap import freeze_heap, pause_collection


class _Ring:
    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_during_a_start_and_new_garbage_is_after_it() -> None:
    try:
        pause_collection()
        assert not gc.isenabled()
        loaded = [[] for _ in range(1000)]
        freeze_heap()
        assert gc.isenabled()
        assert gc.get_freeze_count() >= len(loaded)
        new_garbage = weakref.ref(_Ring())
        gc.collect()
        assert new_garbage() is None
    finally:
        gc.enable()
        gc.unfreeze()


# Requests as a server sees them: each is read into 256 KiB, and parts of some of them live for a while.
_REQUESTS = """
import collections, ctypes, os, random
from headwater.heap import map_large_buffers
map_large_buffers()
loaded = bytes(20 << 20)  # freeing much memory raises glibc's own threshold
del loaded
class Info(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
reader, writer = os.pipe()
choices = random.Random(0)
living = collections.deque(maxlen=200)
for _ in range(15_000):
    os.write(writer, b"x" * choices.randrange(600, 3000))
    request = os.read(reader, 256 << 10)
    if choices.random() < 0.5:
        living.append((request, bytes(choices.randrange(600, 4000))))
info = libc.mallinfo2()
print(info.arena, info.uordblks)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_reads_from_sockets_do_not_splinter_the_heap() -> None:
    """Without `map_large_buffers` the heap is nearly three times as large as what is in use, and still grows."""
    done = subprocess.run([sys.executable, "-c", _REQUESTS], capture_output=True, text=True, timeout=60, check=True)
    heap, in_use = map(int, done.stdout.split())
    assert heap < 1.5 * in_use, f"{heap} bytes of heap for {in_use} in use"
