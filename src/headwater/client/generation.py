"""One running generation as its consumer sees it."""

import asyncio
from collections.abc import Callable

from headwater.messages.generation import Output


class Generation:
    """The outputs of one request, in order, the last of which has `finish`.

    One consumer. `async for output in generation` yields them one at a time; `take` gives all that have
    arrived, so that a consumer slower than the engine handles several steps at once and does not fall behind.
    `close` before the end aborts the request in the engine; use `contextlib.closing` or `aclose`.

    Raises `EngineGone` from `take` when the engine ends, `CallFailed` when it refuses the request.
    """

    __slots__ = ("_arrived", "_ended", "_error", "_on_close", "_waiter", "engine", "is_closed", "rid")

    def __init__(self, rid: str, *, engine: int, on_close: Callable[["Generation"], None]) -> None:
        self.rid = rid  # on the wire
        self.engine = engine  # index of the engine that runs it
        self.is_closed = False
        self._arrived: list[Output] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._ended = False
        self._on_close = on_close

    # --- the consumer's side -----------------------------------------------------------------------

    async def take(self) -> list[Output]:
        """All outputs that arrived since the last call, at least one; waits for it. Empty after the end."""
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if self._ended or self.is_closed:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        arrived, self._arrived = self._arrived, []
        return arrived

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Output:
        outputs = await self.take()
        if not outputs:
            raise StopAsyncIteration
        self._arrived[:0] = outputs[1:]
        return outputs[0]

    def close(self) -> None:
        """Stop listening. Aborts the request unless it has ended. Harmless when repeated."""
        if not self.is_closed:
            self.is_closed = True
            self._arrived.clear()
            self._wake()
            self._on_close(self)

    async def aclose(self) -> None:
        self.close()

    # --- the link's side ---------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """Whether the engine has said its last word about this request."""
        return self._ended

    def put(self, output: Output) -> None:
        if output.finish is not None:
            self._ended = True
        if not self.is_closed:
            self._arrived.append(output)
            self._wake()

    def fail(self, error: Exception) -> None:
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
