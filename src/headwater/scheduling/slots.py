"""The runner's slots: which request is in which, and how often each has been used."""

from headwater.scheduling.request import Request


class Slots:
    """The use count of a slot separates results of its present request from those of earlier ones."""

    def __init__(self, num_slots: int) -> None:
        self.uses = [0] * num_slots
        self._requests: list[Request | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def is_full(self) -> bool:
        return not self._free

    def enter(self, request: Request) -> int:
        """Give `request` a slot; returns the use count of the slot."""
        slot = self._free.pop()
        self.uses[slot] += 1
        self._requests[slot] = request
        request.slot = slot
        return self.uses[slot]

    def leave(self, request: Request) -> None:
        self._requests[request.slot] = None
        self._free.append(request.slot)
        request.slot = -1

    def at(self, slot: int, *, use: int) -> Request | None:
        """The request that a result belongs to; None if it has left the slot."""
        return self._requests[slot] if self.uses[slot] == use else None
