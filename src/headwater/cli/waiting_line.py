"""A line on stderr that says what is being waited for, from the moment on at which a person begins to wonder."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

WONDER_S = 1.0  # what comes sooner needs no word
REFRESH_S = 0.5
CLEAR = "\r\x1b[K"


class WaitingLine:
    """Shows `reason()` and the seconds until `stop`. A terminal sees one line that is gone afterwards; a file gets a
    line for each new reason. Use as a context manager."""

    def __init__(self, reason: Callable[[], str], *, stream: TextIO | None = None, wonder_s: float = WONDER_S) -> None:
        """`reason` is asked in a thread of its own and may take its time."""
        self._reason = reason
        self._stream = stream or sys.stderr
        self._wonder_s = wonder_s
        self._started_s = time.monotonic()
        self._stopped = threading.Event()
        self._painting = threading.Lock()
        self._last = ""  # what a file was told last
        self._is_shown = False

    def __enter__(self) -> "WaitingLine":
        threading.Thread(target=self._run, name="waiting-line", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the line away; nothing is shown after this. Harmless when repeated."""
        with self._painting:
            self._stopped.set()
            if self._is_shown:
                self._stream.write(CLEAR)
                self._stream.flush()
                self._is_shown = False

    def _run(self) -> None:
        self._stopped.wait(self._wonder_s)
        while not self._stopped.is_set():
            reason = self._reason()
            with self._painting:
                if not self._stopped.is_set():
                    self._paint(reason)
            self._stopped.wait(REFRESH_S)

    def _paint(self, reason: str) -> None:
        if self._stream.isatty():
            self._stream.write(f"{CLEAR}({reason}, {time.monotonic() - self._started_s:.0f} s)")
            self._is_shown = True
        elif reason != self._last:
            self._stream.write(f"({reason})\n")
            self._last = reason
        self._stream.flush()
