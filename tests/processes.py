"""Other processes: as /proc shows them, where one that ends in the middle of a look has ended, and ports for them."""

import os
import socket
from pathlib import Path

from headwater.bench.machine import stat_fields


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    fields = stat_fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def command_of(pid: int) -> list[str]:
    """The arguments of a process; empty when it has ended."""
    try:
        return [os.fsdecode(part) for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []


def ancestors_of(pid: int) -> list[int]:
    """The parent of a process, its parent and so on, as far as they run."""
    found = []
    while fields := stat_fields(pid):
        pid = int(fields[1])
        found.append(pid)
    return found


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
