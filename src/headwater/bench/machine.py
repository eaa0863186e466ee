"""The load on this machine, by /proc: the cores that neither the load generator nor the measured servers used.

A process that ends while its files are read has ended: opening them fails with ENOENT, reading one opened before with
ESRCH.
"""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def all_processes() -> dict[int, list[str]]:
    """The fields of every process."""
    found = {int(entry.name): stat_fields(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit()}
    return {pid: fields for pid, fields in found.items() if fields}


def command_of(pid: int) -> list[str]:
    """The arguments of a process, or the title that it has given itself; empty when it has ended."""
    try:
        line = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return os.fsdecode(line.removesuffix(b"\0")).split("\0") if line else []


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, by number. One that has ended stays until it is waited for."""
    return sorted(child for child, fields in all_processes().items() if int(fields[1]) == pid)


def process_tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for pid, fields in all_processes().items():
        children.setdefault(int(fields[1]), []).append(pid)
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def cpu_s(pid: int) -> float:
    """Seconds of a core that a process has used; 0 when it is gone."""
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def rss_mib(pid: int) -> float:
    """Resident memory of one process, shared pages included; 0 when it is gone."""
    fields = stat_fields(pid)
    return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if fields else 0.0


def busy_s() -> float:
    """Time all cores together have not been idle, steal by other machines included."""
    with (PROC / "stat").open() as stat:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def listeners_on(port: int) -> list[int]:
    """The processes that listen on a TCP port of this machine, as far as this user may see."""
    inodes = {
        f"socket:[{fields[9]}]"
        for table in ("tcp", "tcp6")
        for fields in _table(PROC / "net" / table)
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port
    }
    return [pid for pid in all_processes() if inodes & set(open_files(pid))]


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process refer to. Empty when the process is gone or another user's."""
    found = []
    with contextlib.suppress(OSError):
        for entry in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed since; a busy server closes connections all the time
                found.append(os.readlink(entry))
    return found


def processes_of_server(port: int) -> list[int]:
    """The listeners on a port with their descendants, and the processes of their group.

    The process that a user starts is often the parent of the listener.
    """
    listeners = listeners_on(port)
    found = {pid for listener in listeners for pid in process_tree(listener)}
    everything = all_processes()
    groups = {everything[pid][2] for pid in listeners if pid in everything}
    return sorted(found | {pid for pid, fields in everything.items() if fields[2] in groups})


class ForeignLoad:
    """The load of others between two moments. Where there is no /proc, nothing is known."""

    def __init__(self, own: Iterable[int]) -> None:
        """`own`: processes that belong to the measurement, besides this one."""
        self._own = {*own, os.getpid()}
        self._began_s = time.perf_counter()
        self._before = self._now()

    def cores(self) -> float | None:
        """How many cores others have used on average since the beginning."""
        now = self._now()
        if now is None or self._before is None:
            return None
        return max(0.0, (now - self._before) / max(time.perf_counter() - self._began_s, 1e-9))

    def _now(self) -> float | None:
        try:
            return busy_s() - sum(cpu_s(pid) for pid in self._own)
        except (OSError, ValueError):
            return None


def _table(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines()[1:]]
    except OSError:
        return []


