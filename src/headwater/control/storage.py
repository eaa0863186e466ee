"""Attaching and detaching a store under traffic."""

from headwater.control.operation import Hold, Moment, Permit
from headwater.control.ports import OpeningStorage, StoragePort
from headwater.messages.cache import AttachStorage
from headwater.messages.control import Failed
from headwater.messages.wire import ToClient


class StorageAttach:
    """Opens the store off the loop; then it takes the place of the one attached, if any. Nothing waits for idle."""

    kind = "attach_storage"
    is_exclusive = True
    hold = Hold.NOTHING
    phase = "opening"

    def __init__(self, message: AttachStorage, storage: StoragePort, permit: Permit | None = None) -> None:
        self._message = message
        self._permit = permit or Permit()
        self._storage = storage
        self._opening: OpeningStorage | None = None

    @property
    def is_polling(self) -> bool:
        return not self._permit.is_awaited

    def in_flight(self) -> dict[str, int]:
        return {}

    def look(self, moment: Moment) -> ToClient | None:
        if self._opening is None:
            self._opening = self._storage.open(self._message)
        if not self._opening.is_ready():
            if not moment.has_expired:
                return None
            self._opening.abandon()
            return self._failed("the store did not open in time")
        error = self._opening.error()
        if error is not None:
            return self._failed(error)
        if not self._permit.ask():
            return None
        return self._storage.attach(self._opening, self._message)

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        if self._opening is not None:
            self._opening.abandon()
        return self._failed(reason)

    def _failed(self, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=400, message=message, param="hicache_storage_backend")
