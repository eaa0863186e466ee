#!/usr/bin/env python3
"""The cost of attacks on the HTTP side, for a running server and for its other clients.

    headwater serve --port 31200 2> server.log &
    http_attacks.py --url http://127.0.0.1:31200 --pid $! --log server.log --save

Each attack runs while a client without keep-alive requests `/health` every 20 ms. The report has the server's CPU
seconds (with --pid: only those of the API process), the latency of `/health`, and the number and lifetime of the
connections that the attack kept.
"""

import argparse
import contextlib
import http.client
import os
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from results import save

PROBE_EVERY_S = 0.02
WATCHED_AT_LEAST_S = 3.0
PIECE = b"a" * 65536
HALF_HEAD = b"POST /generate HTTP/1.1\r\nhost: localhost\r\nx-half: sent"
TRICKLE_HEAD = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n{"
Record = dict[str, Any]


class Victim:
    """The server under attack, with a client that requests its health all the time."""

    def __init__(self, url: str, *, pid: int | None, log: Path | None) -> None:
        self.url = url
        self._pid = pid
        self._log = log
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)

    def connect(self) -> socket.socket:
        return socket.create_connection(self._address, timeout=30)

    def cpu_s(self) -> float:
        """CPU seconds of the API process so far."""
        if self._pid is None:
            return 0.0
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def num_tracebacks(self) -> int:
        return self._log.read_text(errors="replace").count("Traceback") if self._log else 0

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._pid}/fd")) if self._pid else 0

    @contextlib.contextmanager
    def watched(self, name: str) -> Iterator[Record]:
        """A record of the effects of an attack on other clients; the attack adds its own observations."""
        record: Record = {"attack": name}
        ended = threading.Event()
        latencies_s: list[float] = []
        failures: list[str] = []
        thread = threading.Thread(target=self._probe, args=(ended, latencies_s, failures), daemon=True)
        cpu_s, tracebacks, began_s = self.cpu_s(), self.num_tracebacks(), time.perf_counter()
        thread.start()
        try:
            yield record
        finally:
            record["attack_s"] = round(time.perf_counter() - began_s, 3)
            time.sleep(max(0.0, WATCHED_AT_LEAST_S - record["attack_s"]))
            record["server_cpu_s"] = round(self.cpu_s() - cpu_s, 3)
            ended.set()
            thread.join()
            record["tracebacks"] = self.num_tracebacks() - tracebacks
            record["num_health"] = len(latencies_s)
            record["health_failures"] = failures[:5] + ([f"{len(failures)} in all"] if len(failures) > 5 else [])
            if latencies_s:
                record["health_median_s"] = round(statistics.median(latencies_s), 4)
                record["health_most_s"] = round(max(latencies_s), 4)

    def _probe(self, ended: threading.Event, latencies_s: list[float], failures: list[str]) -> None:
        while not ended.wait(PROBE_EVERY_S):
            began_s = time.perf_counter()
            connection = http.client.HTTPConnection(*self._address, timeout=30)  # like a new client
            try:
                connection.request("GET", "/health")
                status = connection.getresponse().status
                if status != 200:
                    failures.append(f"status {status}")
            except (OSError, http.client.HTTPException) as error:
                failures.append(repr(error))
            finally:
                connection.close()
            latencies_s.append(time.perf_counter() - began_s)


def nothing(victim: Victim) -> Record:
    """The same measurement without an attack."""
    with victim.watched("nothing") as record:
        time.sleep(5)
    return record


def large_headers(victim: Victim, num_bytes: int = 64 << 20) -> Record:
    """One header of 64 MiB, as fast as the server takes it."""
    with victim.watched("64 MiB of headers") as record, victim.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nx-long: ")
        num_sent = 0
        with contextlib.suppress(OSError):
            while num_sent < num_bytes:
                num_sent += sock.send(PIECE)
        with contextlib.suppress(OSError):
            record["answer"] = sock.recv(100).partition(b"\r\n")[0].decode()
        record["mib_taken"] = round(num_sent / (1 << 20), 2)
    return record


def half_sent(victim: Victim, count: int = 500) -> Record:
    """Incomplete requests, until the server has closed all of their connections."""
    with victim.watched(f"{count} half-sent requests") as record:
        return _hold(victim, record, count=count, head=HALF_HEAD)


def trickling(victim: Victim, count: int = 100) -> Record:
    """Bodies that arrive at one byte per second."""
    with victim.watched(f"{count} trickling bodies") as record:
        return _hold(victim, record, count=count, head=TRICKLE_HEAD, piece=b" ")


def many_connections(victim: Victim, count: int = 9000) -> Record:
    """Connections that send nothing, more than the descriptor limit of many systems."""
    with victim.watched(f"{count} connections") as record:
        return _hold(victim, record, count=count, head=b"")


def _hold(victim: Victim, record: Record, *, count: int, head: bytes, piece: bytes = b"") -> Record:
    """Open connections, send `head`, then `piece` each second; record the time when the last one was closed."""
    with contextlib.ExitStack() as stack:
        open_: list[socket.socket] = []
        began_s = time.perf_counter()
        for _ in range(count):
            with contextlib.suppress(OSError):
                sock = stack.enter_context(victim.connect())
                sock.sendall(head)
                sock.setblocking(False)
                open_.append(sock)
        record["num_opened"] = len(open_)
        record["opening_s"] = round(time.perf_counter() - began_s, 3)
        record["most_descriptors"] = victim.num_descriptors()
        while open_ and time.perf_counter() - began_s < 60:
            time.sleep(1)
            open_ = [sock for sock in open_ if _is_open(sock, piece)]
        record["num_left_after_60_s"] = len(open_)
        record["all_closed_after_s"] = None if open_ else round(time.perf_counter() - began_s, 1)
    return record


def _is_open(sock: socket.socket, piece: bytes) -> bool:
    try:
        if piece:
            sock.send(piece)
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


ATTACKS: tuple[Callable[[Victim], Record], ...] = (nothing, large_headers, half_sent, many_connections, trickling)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--pid", type=int, help="of `headwater serve`, on this machine")
    parser.add_argument("--log", type=Path, help="where its stderr goes: tracebacks are counted")
    parser.add_argument("--note", default="", help="a note about this run, for the record")
    parser.add_argument("--save", action="store_true", help="write a record to results/")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    victim = Victim(args.url, pid=args.pid, log=args.log)
    records = []
    for attack in ATTACKS:
        records.append(attack(victim))
        print(records[-1], flush=True)
        time.sleep(2)
    if args.save:
        facts = {"note": args.note, "descriptors_of_the_attacker": hard}
        print(save("http-attacks", records, servers={"headwater": facts}))
    return 1 if any(record["tracebacks"] or record["health_failures"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
