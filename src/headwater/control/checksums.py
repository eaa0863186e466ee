"""A hash of every tensor in place, computed in a thread while requests run."""

import threading

from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Moment, Operation, Permit
from headwater.messages.base import Answer
from headwater.messages.control import Failed
from headwater.messages.weights import Checksums, GetChecksums

_SHORT_S = 0.002


class ChecksumRun(Operation):
    """No update swaps or overwrites weights meanwhile: these wait for each other."""

    kind = "checksums"
    is_exclusive = True

    def __init__(self, message: GetChecksums, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        self._thread: threading.Thread | None = None
        self._found: dict[str, str] | None = None
        self._error = ""

    @property
    def phase(self) -> str:
        return "queued" if self._thread is None else "hashing"

    @property
    def is_polling(self) -> bool:
        return self._thread is not None

    def look(self, moment: Moment) -> Answer | None:
        if self._thread is None:
            if "weights" in self._engine.orders.released:
                return self._failed(400, "the weights are released: there is nothing to hash")
            self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
            self._thread.start()
            self._thread.join(_SHORT_S)  # small models are done by then: no turn later
        if self._thread.is_alive():
            return self._failed(408, "the weights were not hashed in time") if moment.has_expired else None
        if self._found is None:
            return self._failed(500, f"the weights could not be hashed: {self._error}")
        return Checksums(
            call_id=self._message.call_id, weights_id=self._engine.scheduler.weights_id, checksums=self._found
        )

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        return self._failed(409, reason)

    def _run(self) -> None:
        try:
            self._found = self._engine.weights.checksums()
        except Exception as error:  # noqa: BLE001  the caller gets the reason
            self._error = f"{type(error).__name__}: {error}"

    def _failed(self, status: int, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=status, message=message)
