"""A line on stderr that shows the reason for a wait, once the wait is long enough to notice."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

WONDER_S = 1.0  # shorter waits show nothing
REFRESH_S = 0.5
CLEAR = "\r\x1b[K"


class WaitingLine:
    """Shows `reason()` and the seconds until `stop`. Use as a context manager.

    A terminal shows one line, which is erased at the end; a file gets a line for each new reason.
    """

    def __init__(self, reason: Callable[[], str], *, stream: TextIO | None = None, wonder_s: float = WONDER_S) -> None:
        """`reason` is called in a separate thread and may block."""
        self._reason = reason
        self._stream = stream or sys.stderr
        self._wonder_s = wonder_s
        self._started_s = time.monotonic()
        self._stopped = threading.Event()
        self._painting = threading.Lock()
        self._last = ""  # the last reason written to a file
        self._is_shown = False

    def __enter__(self) -> "WaitingLine":
        threading.Thread(target=self._run, name="waiting-line", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Erase the line for good. Repeated calls do nothing."""
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
