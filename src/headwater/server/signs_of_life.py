"""Messages of `headwater serve` during a long start, and the age of this process."""

import logging
import os
import threading
import time
from pathlib import Path

SIGN_EVERY_S = 5.0
_imported_s = time.monotonic()

log = logging.getLogger(__name__)


class SignsOfLife:
    """Logs every few seconds that the server is still starting, from a thread that long imports do not block.

    Use as a context manager; call `stop` when the server is ready.
    """

    def __init__(self, every_s: float = SIGN_EVERY_S) -> None:
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs-of-life", daemon=True)

    def __enter__(self) -> "SignsOfLife":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Log nothing more. Repeated calls do nothing."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            log.info("still starting after %.0f s; requests get 503 until the server is ready", process_age_s())


def process_age_s() -> float:
    """Seconds since the start of this process, or since the import of this module if the system does not report it."""
    try:
        # field 22: ticks from boot to start; counted from the end of the name, which may contain spaces
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _imported_s
