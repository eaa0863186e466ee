"""A wire in memory, whose loop sleeps in virtual time."""

from collections.abc import Callable

from headwater.clock import ManualClock
from headwater.messages.wire import ToClient, ToEngine


class MemoryWire:
    """`engine.wire.Wire` between a driver and its engine. The loop's sleep moves the clock."""

    def __init__(self, clock: ManualClock) -> None:
        self.inbound: list[tuple[bytes, ToEngine]] = []
        self.sent: list[tuple[bytes, ToClient]] = []
        self.last_wait_s = 0.0
        self.on_receive: Callable[[float, list[tuple[bytes, ToEngine]]], None] | None = None
        self._clock = clock

    def receive(self, *, wait_s: float) -> list[tuple[bytes, ToEngine]]:
        self.last_wait_s = wait_s
        taken, self.inbound = self.inbound, []
        if self.on_receive is not None:
            self.on_receive(wait_s, taken)
        if not taken:
            self._clock.advance(wait_s)
        return taken

    def send(self, client: bytes, message: ToClient) -> None:
        self.sent.append((client, message))

    def close(self) -> None:
        """There is nothing to close."""
