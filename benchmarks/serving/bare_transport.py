"""What a transfer of weights is compared with: plain copies of the same bytes, and the bare transport of them.

`bare_transport.py KIND PORT` is the other process of a bare transport. It receives into memory that it has, and does
nothing else with the bytes. Each line of standard input is a list of sizes; a broadcast or a byte back says that all
has come.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SHARED = Path("/dev/shm")
PIECE_BYTES = 4 << 20
Bucket = Sequence[torch.Tensor]
Measure = Callable[[Sequence[Bucket]], float]  # buckets -> GB/s


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def num_bytes_of(buckets: Iterable[Bucket]) -> int:
    return sum(tensor.nbytes for bucket in buckets for tensor in bucket)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- plain copies ----------------------------------------------------------------------------------------------------


def copy_gb_per_s(buckets: Sequence[Bucket]) -> float:
    """Written to a new file in shared memory: the system makes its pages."""
    with tempfile.NamedTemporaryFile(dir=SHARED, buffering=0) as file:
        began_s = time.perf_counter()
        for bucket in buckets:
            for tensor in bucket:
                data = memoryview(as_bytes(tensor).numpy())
                while data:
                    data = data[file.write(data[:PIECE_BYTES]) or 0 :]
        return num_bytes_of(buckets) / (time.perf_counter() - began_s) / 1e9


class CopyOver:
    """Copied in memory that exists already: no way can do less."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def gb_per_s(self, buckets: Sequence[Bucket]) -> float:
        largest = max(num_bytes_of([bucket]) for bucket in buckets)
        if self._memory is None or len(self._memory) < largest:
            self._memory = torch.ones(largest, dtype=torch.uint8)
        took_s = 0.0
        for bucket in buckets:
            began_s, at = time.perf_counter(), 0
            for tensor in bucket:
                target = self._memory[at : at + tensor.nbytes].numpy()
                target[:] = as_bytes(tensor).numpy()  # by one thread; several of PyTorch's would wait for the server's
                at += tensor.nbytes
            took_s += time.perf_counter() - began_s
        return num_bytes_of(buckets) / took_s / 1e9


def gpu_to_host_gb_per_s(buckets: Sequence[Bucket]) -> float:
    """From a card to pageable host memory that exists already."""
    source = torch.zeros(min(num_bytes_of(buckets), 1 << 30), dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source, device="cpu")
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize()
    return source.nbytes / (time.perf_counter() - began_s) / 1e9


def device_to_device_gb_per_s(num_bytes: int) -> float:
    """Within a card: what no way through host memory can reach."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize()
    return num_bytes / (time.perf_counter() - began_s) / 1e9


# --- bare transports -------------------------------------------------------------------------------------------------


class BareTransport:
    """Two processes, over gloo or a socket of this host. `with` it: the other process ends behind it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __enter__(self) -> "BareTransport":
        port = _free_port()
        command = [sys.executable, __file__, self._kind, str(port)]
        with ExitStack() as undo:
            self._other = undo.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
            undo.callback(self._other.kill)
            self._end = GlooEnd(port, rank=0) if self._kind == "gloo" else SocketEnd.listening(port)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def pid(self) -> int:
        """Of the other process."""
        return self._other.pid

    def gb_per_s(self, buckets: Sequence[Bucket]) -> float:
        """From the first byte to the other's word that the last one has come, bucket by bucket."""
        assert self._other.stdin is not None
        began_s = time.perf_counter()
        for bucket in buckets:
            self._other.stdin.write(json.dumps([tensor.nbytes for tensor in bucket]) + "\n")
            self._other.stdin.flush()
            self._end.send([as_bytes(tensor) for tensor in bucket])
        return num_bytes_of(buckets) / (time.perf_counter() - began_s) / 1e9


class GlooEnd:
    """One of the two ranks of a group of its own: a process may be in other groups as well."""

    def __init__(self, port: int, *, rank: int) -> None:
        timeout = timedelta(seconds=120)
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timeout)
        self._group = dist.ProcessGroupGloo(store, rank, 2, timeout)

    def send(self, pieces: Sequence[torch.Tensor]) -> None:
        self._broadcast(pieces, 0)
        self._broadcast([torch.zeros(1, dtype=torch.uint8)], 1)

    def receive(self, pieces: Sequence[torch.Tensor]) -> None:
        self.send(pieces)  # rank 1 gets what rank 0 gives

    def _broadcast(self, pieces: Sequence[torch.Tensor], root: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = root
        for work in [self._group.broadcast([piece], options) for piece in pieces]:
            work.wait()


class SocketEnd:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @classmethod
    def listening(cls, port: int) -> "SocketEnd":
        with socket.create_server(("127.0.0.1", port)) as server:
            server.settimeout(120)
            connection, _ = server.accept()
        connection.settimeout(None)
        return cls(connection)

    @classmethod
    def connected(cls, port: int) -> "SocketEnd":
        until_s = time.monotonic() + 60
        while True:
            try:
                return cls(socket.create_connection(("127.0.0.1", port)))
            except OSError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.05)

    def send(self, pieces: Sequence[torch.Tensor]) -> None:
        for piece in pieces:
            self._connection.sendall(memoryview(piece.numpy()))
        self._connection.recv(1)

    def receive(self, pieces: Sequence[torch.Tensor]) -> None:
        for piece in pieces:
            view = memoryview(piece.numpy())
            while view:
                view = view[self._connection.recv_into(view) :]
        self._connection.send(b"1")


def main() -> int:
    kind, port = sys.argv[1], int(sys.argv[2])
    end = GlooEnd(port, rank=1) if kind == "gloo" else SocketEnd.connected(port)
    memory = torch.empty(0, dtype=torch.uint8)
    for line in sys.stdin:
        sizes: list[int] = json.loads(line)
        if len(memory) < sum(sizes):
            memory = torch.ones(sum(sizes), dtype=torch.uint8)
        end.receive(memory[: sum(sizes)].split(sizes))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
