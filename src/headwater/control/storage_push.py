"""Before a server ends: everything that it has cached goes to the store."""

from headwater.cache.storage.push import StorePush
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Moment, Operation, Permit
from headwater.messages.base import Answer
from headwater.messages.cache import CachePersisted, PersistCache
from headwater.messages.control import Failed


class StoragePush(Operation):
    """Goes on beside requests, a few copies at a time. At its deadline, what was copied stays copied."""

    kind = "persist_cache"

    def __init__(self, message: PersistCache, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._cache = engine.cache
        self._push: StorePush | None = None

    @property
    def phase(self) -> str:
        return "copying"

    @property
    def is_polling(self) -> bool:
        return True

    def arrive(self) -> Failed | None:
        return self._failed("no store is attached") if self._cache.lower.storage is None else None

    def look(self, moment: Moment) -> Answer | None:
        if self._cache.lower.storage is None:
            return self._failed("the store was detached meanwhile")
        if self._push is None:
            self._push = StorePush(self._cache.lower, self._cache.tree)
        if self._push.advance() or moment.has_expired:
            return self._answer()
        return None

    def cancelled(self, moment: Moment, reason: str) -> Answer:
        return self._answer() if self._push is not None else self._failed(reason)

    def _answer(self) -> CachePersisted:
        assert self._push is not None
        is_whole = self._push.advance() and not self._push.num_dropped
        return CachePersisted(
            call_id=self._message.call_id,
            num_pages=self._push.num_pages,
            num_dropped=self._push.num_dropped,
            is_whole=is_whole,
        )

    def _failed(self, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=409, message=message)
