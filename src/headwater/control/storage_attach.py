"""Attaching a store under traffic."""

from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Moment, Operation, Permit
from headwater.control.storage_opening import Kept, Opening
from headwater.messages.base import Answer
from headwater.messages.cache import AttachStorage
from headwater.messages.control import Failed


class StorageAttach(Operation):
    """Opens the store off the loop, then puts it in the place of the one attached. Neither waits for idle."""

    kind = "attach_storage"
    is_exclusive = True

    def __init__(self, message: AttachStorage, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._permit = permit
        self._storage = engine.storage
        self._opening: Opening | Kept | None = None

    @property
    def phase(self) -> str:
        return "opening"

    def arrive(self) -> Failed | None:
        why_not = self._storage.why_not()
        return None if why_not is None else self._failed(why_not)

    @property
    def is_polling(self) -> bool:
        return not self._permit.is_awaited

    def look(self, moment: Moment) -> Answer | None:
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
