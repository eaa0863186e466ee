"""How far a round is, on stderr: one line that a terminal rewrites, and nothing elsewhere."""

import sys
import threading
import time
from typing import TextIO

from headwater.bench.exchange import Watched
from headwater.bench.load import Target

REFRESH_S = 0.5
BAR_WIDTH = 24
CLEAR = "\r\x1b[K"


class Progress:
    """A context manager; `start` begins with the line of a round, `stop` erases it."""

    def __init__(self, *, num_requests: int, stream: TextIO | None = None) -> None:
        self._num_requests = num_requests
        self._stream = stream or sys.stderr
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, target: Target, number: int, watched: Watched) -> None:
        self.stop()
        if not self._stream.isatty():
            return
        self._ended = threading.Event()
        arguments = (f"{target.name}, round {number + 1}", watched, self._ended)
        self._thread = threading.Thread(target=self._run, args=arguments, name="progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._stream.write(CLEAR)
            self._stream.flush()

    def _run(self, label: str, watched: Watched, ended: threading.Event) -> None:
        began_s = before_s = time.monotonic()
        before = 0
        while not ended.wait(REFRESH_S):
            now_s, num_tokens = time.monotonic(), watched.num_tokens
            rate = (num_tokens - before) / (now_s - before_s)
            before, before_s = num_tokens, now_s
            line = progress_line(label, watched, self._num_requests, seconds=now_s - began_s, tokens_per_s=rate)
            self._stream.write(CLEAR + line)
            self._stream.flush()


def progress_line(label: str, watched: Watched, num_requests: int, *, seconds: float, tokens_per_s: float) -> str:
    """At most about 100 columns."""
    done = min(1.0, watched.num_done / num_requests)
    full = round(BAR_WIDTH * done)
    bar = "#" * full + "." * (BAR_WIDTH - full)
    failed = f", {watched.num_failed} failed" if watched.num_failed else ""
    return (
        f"{label} [{bar}] {watched.num_done}/{num_requests}, {watched.num_running} running{failed}, "
        f"{tokens_per_s:,.0f} tokens/s, {seconds:.0f} s"
    )
