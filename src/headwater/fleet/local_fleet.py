"""The fleet on this machine as other processes find it: a file that `headwater fleet up` writes. No Ray here."""

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_DOWN_S = 60.0


@dataclass(frozen=True, slots=True)
class LocalFleet:
    """The process that serves the fleet, and the address at which it does."""

    pid: int
    url: str

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))

    @property
    def is_alive(self) -> bool:
        try:
            return b"fleet" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return False

    def end(self) -> None:
        """Returns when it has ended. Raises TimeoutError."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(self.pid, signal.SIGTERM)
        deadline_s = time.monotonic() + _DOWN_S
        while self.is_alive:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"process {self.pid} has not ended in {_DOWN_S:.0f} s")
            time.sleep(0.1)


def running_fleet(path: Path) -> LocalFleet:
    """The fleet that `path` names. ValueError if none runs."""
    try:
        found = LocalFleet(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError("no fleet runs here; `headwater fleet up` starts one") from None
    if not found.is_alive:
        raise ValueError(f"process {found.pid}, which served a fleet, is not there any more")
    return found
