"""A hash of every tensor in place, computed in threads of all ranks while requests run."""

from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Moment, Operation, Permit
from headwater.control.ports import StagedHashes
from headwater.messages.base import Answer
from headwater.messages.control import Failed
from headwater.messages.weights import Checksums, GetChecksums


class ChecksumRun(Operation):
    """No update swaps or overwrites weights meanwhile: these wait for each other."""

    kind = "checksums"
    is_exclusive = True

    def __init__(self, message: GetChecksums, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        self._hashes: StagedHashes | None = None

    @property
    def phase(self) -> str:
        return "queued" if self._hashes is None else "hashing"

    @property
    def is_polling(self) -> bool:
        return self._hashes is not None

    def look(self, moment: Moment) -> Answer | None:
        if self._hashes is None:
            if "weights" in self._engine.orders.released:
                return self._failed(400, "the weights are released: there is nothing to hash")
            self._hashes = self._engine.weights.hash()
        if not self._hashes.is_ready():
            return self._too_late(self._hashes) if moment.has_expired else None
        if (error := self._hashes.error()) is not None:
            return self._failed(500, f"the weights could not be hashed: {error}")
        weights_id = self._engine.scheduler.weights_id
        return Checksums(call_id=self._message.call_id, weights_id=weights_id, checksums=self._hashes.found())

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        if self._hashes is not None:
            self._hashes.abandon()
        return self._failed(409, reason)

    def _too_late(self, hashes: StagedHashes) -> Failed:
        hashes.abandon()
        return self._failed(408, "the weights were not hashed in time")

    def _failed(self, status: int, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=status, message=message)
