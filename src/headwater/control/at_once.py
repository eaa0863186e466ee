"""Changes that take no time, as operations: so that one of several engines can wait for the others first."""

from collections.abc import Callable

from headwater.control.operation import Hold, Moment, Permit
from headwater.control.ports import PinningPort
from headwater.messages.cache import PinPrefix, Pins, UnpinPrefix
from headwater.messages.control import Failed
from headwater.messages.wire import ToClient


class AtOnce:
    """A change that cannot fail: `do` makes it and returns its answer."""

    is_exclusive = False
    is_polling = False
    hold = Hold.NOTHING
    phase = "queued"

    def __init__(self, kind: str, call_id: str, do: Callable[[], ToClient], permit: Permit) -> None:
        self.kind = kind
        self._call_id = call_id
        self._do = do
        self._permit = permit

    def in_flight(self) -> dict[str, int]:
        return {}

    def look(self, moment: Moment) -> ToClient | None:
        return self._do() if self._permit.ask() else None

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        return Failed(call_id=self._call_id, status=409, message=f"{reason}; nothing was changed")


class PinChange:
    """A pin that is set before the permit, which may fail, and taken off again if that does not come."""

    is_exclusive = False
    is_polling = False
    hold = Hold.NOTHING
    phase = "queued"
    kind = "pin"

    def __init__(self, message: PinPrefix | UnpinPrefix, pinning: PinningPort, permit: Permit) -> None:
        self._message = message
        self._pinning = pinning
        self._permit = permit
        self._pinned: Pins | None = None

    def in_flight(self) -> dict[str, int]:
        return {}

    def look(self, moment: Moment) -> ToClient | None:
        if isinstance(self._message, UnpinPrefix):
            if not self._pinning.has(self._message.pin_id) or self._permit.ask():
                return self._pinning.answer(self._message)
            return None
        if self._pinned is None:
            answer = self._pinning.answer(self._message)
            if not isinstance(answer, Pins):
                return answer
            self._pinned = answer
        return self._pinned if self._permit.ask() else None

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        for item in self._pinned.items if self._pinned is not None else ():
            self._pinning.answer(UnpinPrefix(call_id="", pin_id=item.pin_id))
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; nothing was changed")
