"""Other processes: as /proc shows them, where one that ends in the middle of a look has ended, and ports for them.

And this process: how much time it lost to those that the machine ran instead.
"""

import socket
import threading
import time

from headwater.bench.machine import stat_fields


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    fields = stat_fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def ancestors_of(pid: int) -> list[int]:
    """The parent of a process, its parent and so on, as far as they run."""
    found = []
    while fields := stat_fields(pid):
        pid = int(fields[1])
        found.append(pid)
    return found


class Stalls:
    """How long this process got no processor: a thread that sleeps for 10 ms wakes that much too late.

    A server that waits for something does not keep the thread from waking.
    """

    def __enter__(self) -> "Stalls":
        self.lost_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        slept_s = time.monotonic()
        while not self._is_over.wait(0.01):
            now_s = time.monotonic()
            self.lost_s += max(0.0, now_s - slept_s - 0.02)
            slept_s = now_s


def held_port() -> socket.socket:
    """A port that nobody else is given while the socket is open. Close it when the server has ended.

    Whoever sets SO_REUSEADDR, as servers do, may listen on it. A port that is only looked up and let go may be
    another test's by the time the server has started, which takes seconds where the machine is busy.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def number_of(holder: socket.socket) -> int:
    return holder.getsockname()[1]
