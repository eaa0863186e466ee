"""The calls of a fleet to the engine of this replica. A call that comes again is answered again, and made once."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from headwater.messages.base import Call, DeferredCall
from headwater.messages.control import CancelOperation
from headwater.messages.two_phase import Commit, InStep, Prepare

REPEAT_S = 1.0  # a front whose connection broke asks again within this time
MAX_KEPT = 64  # answers; a front has few calls open at a time
_CHANGING = (Prepare, Commit, InStep, DeferredCall, CancelOperation)  # other calls may be made twice


class RelayedCalls:
    """Belongs to one event loop."""

    def __init__(self, relay: Callable[[Call], Awaitable[Any]]) -> None:
        """`relay` makes a call; cancelled, it cancels the call."""
        self._relay = relay
        self._calls: OrderedDict[str, asyncio.Task[Any]] = OrderedDict()  # the newest last
        self._num_waiting: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._calls)

    async def answer(self, message: Call) -> Any:
        """The engine's answer. A call without a caller for `REPEAT_S` is cancelled."""
        call_id = message.call_id
        task = self._calls.get(call_id)
        if task is None:
            task = self._calls[call_id] = asyncio.ensure_future(self._relay(message))
            task.add_done_callback(lambda ended: self._ended(message, ended))
            self._drop_old()
        self._num_waiting[call_id] += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._num_waiting[call_id] -= 1
            if not self._num_waiting[call_id]:
                del self._num_waiting[call_id]
                if not task.done():
                    asyncio.get_running_loop().call_later(REPEAT_S, self._end_unless_awaited, call_id, task)

    def _ended(self, message: Call, task: "asyncio.Task[Any]") -> None:
        has_failed = task.cancelled() or task.exception() is not None
        if has_failed or not isinstance(message, _CHANGING):
            self._calls.pop(message.call_id, None)

    def _end_unless_awaited(self, call_id: str, task: "asyncio.Task[Any]") -> None:
        if call_id not in self._num_waiting:
            task.cancel()

    def _drop_old(self) -> None:
        for call_id in [call_id for call_id, task in self._calls.items() if task.done()][: len(self) - MAX_KEPT]:
            del self._calls[call_id]
