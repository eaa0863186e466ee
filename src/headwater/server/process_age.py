"""How long ago this process was started: what a person has waited."""

import os
import time
from pathlib import Path

_imported_s = time.monotonic()


def process_age_s() -> float:
    """Seconds since the start of this process; since this import where the system does not tell."""
    try:
        # the 22nd field, counted from behind the name, which may hold spaces: ticks from boot to start
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _imported_s
