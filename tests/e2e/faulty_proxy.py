"""A proxy between a server and its store that hangs up in the middle, on command."""

import contextlib
import random
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType


class FaultyProxy:
    """Passes what comes to a unix socket of its own on to `target`. `fail_rate`: share of requests that it drops,
    with their connection."""

    def __init__(self, target: Path, *, seed: int = 0) -> None:
        self.fail_rate = 0.0
        self.num_failed = 0
        self._target = target
        self._source = random.Random(seed)
        self._folder = Path(tempfile.mkdtemp(prefix="hw-proxy-"))  # short: a socket's path is limited
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self._folder / "s"))
        self._server.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"unix://{self._folder / 's'}"

    def __enter__(self) -> "FaultyProxy":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.close()
        shutil.rmtree(self._folder)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return  # closed
            target = socket.socket(socket.AF_UNIX)
            target.connect(str(self._target))
            threading.Thread(target=self._carry, args=(client, target, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(target, client, False), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, may_fail: bool) -> None:
        with contextlib.suppress(OSError):  # the other side has gone
            while data := source.recv(1 << 16):
                if may_fail and self._source.random() < self.fail_rate:
                    self.num_failed += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # ends the thread of the other direction, which closes its own
        source.close()
