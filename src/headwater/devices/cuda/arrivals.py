"""Pages that arrive on a GPU a few layers at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headwater.devices.cpu.host_memory import ThreadCopy

_MAX_GROUPS = 8
_MIN_GROUP_BYTES = 32 << 20  # smaller groups are not worth a launch: half a millisecond of the link
# How much may still be in flight when a step that reads the pages is launched: 5 ms of the link, about the time until
# the step needs the last layers. With more, the step would stall all requests in it. A request that runs alone may wait
# on the device instead of the host, but not so long that the next request is delayed.
_MAX_AWAITED_BYTES = 256 << 20
_MAX_AWAITED_ALONE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers [first, stop) of a page."""

    first: int
    stop: int


def layer_groups(*, num_layers: int, layer_bytes: int, num_pages: int, min_piece_bytes: int) -> list[LayerGroup]:
    """Cut pages into groups of layers, each long enough to be copied at the link's speed."""
    num_groups = min(_MAX_GROUPS, num_layers, num_pages * num_layers * layer_bytes // _MIN_GROUP_BYTES)
    if layer_bytes % 8:  # pages are copied in words
        num_groups = 1
    size = max(-(-num_layers // max(1, num_groups)), -(-min_piece_bytes // layer_bytes))
    return [LayerGroup(first, min(first + size, num_layers)) for first in range(0, num_layers, size)]


class Mark:
    """A point in a stream. Without a GPU, under the kernels' interpreter, work is done when it is launched."""

    def __init__(self, *, is_gpu: bool) -> None:
        self._event = torch.cuda.Event(blocking=True) if is_gpu else None  # sleeps; the default would spin on a core

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Sleep until the stream has reached it."""
        if self._event is not None:
            self._event.synchronize()

    def hold_up(self) -> None:
        """Make what is launched on the current stream from now on wait for it. Returns at once."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class Arrival:
    """A restore (`cache.copier.EarlyCopyHandle`) whose groups of layers arrive one after another."""

    def __init__(self, groups: Sequence[LayerGroup], *, layer_bytes: int, is_gpu: bool) -> None:
        """`layer_bytes`: of one layer, all pages together."""
        self.copy = ThreadCopy()
        self.groups = tuple(groups)
        self._marks = [Mark(is_gpu=is_gpu) for _ in groups]
        bytes_left = [(groups[-1].stop - group.first) * layer_bytes for group in groups]  # before each
        self._num_early = sum(left > _MAX_AWAITED_BYTES for left in bytes_left)
        self._num_early_alone = sum(left > _MAX_AWAITED_ALONE_BYTES for left in bytes_left)
        self._num_arrived = 0
        self._is_launched = False
        self._is_found = False

    def is_done(self) -> bool:
        return self.copy.is_done()

    def is_readable(self, *, is_alone: bool) -> bool:
        if self.is_near(is_alone=is_alone):
            self.begin_reading()
        return self._is_found

    def is_near(self, *, is_alone: bool) -> bool:
        """Whether so little is to come that steps may read the pages. Each of several ranks finds it by itself."""
        return self._is_launched and self._num_arrived >= (self._num_early_alone if is_alone else self._num_early)

    def begin_reading(self) -> None:
        """From now on steps wait for the layers that they read."""
        self._is_found = True

    @property
    def is_awaited(self) -> bool:
        """Whether steps may read its pages although they have not all arrived."""
        return self._is_found and not self.copy.is_done()

    @property
    def has_failed(self) -> bool:
        return self.copy.has_failed

    @property
    def took_s(self) -> float:
        return self.copy.took_s

    # --- called by the copying threads, on their stream ---------------------------------------------

    def launch(self, move: Callable[[LayerGroup], None]) -> None:
        """Launch the copies of all groups. Once launched, no group can fail alone."""
        for group, mark in zip(self.groups, self._marks, strict=True):
            move(group)
            mark.record()
        self._is_launched = True

    def wait(self) -> None:
        """Follow the groups as they arrive, as far as `is_readable` depends on them."""
        for mark in self._marks[: self._num_early]:
            mark.wait()
            self._num_arrived += 1

    # --- called where steps are launched ------------------------------------------------------------

    def hold_up(self, layer: int) -> None:
        """Make what is launched on the current stream from now on wait for the pages' layers up to `layer`."""
        for group, mark in zip(self.groups, self._marks, strict=True):
            if layer < group.stop:
                mark.hold_up()
                return


class Arrivals:
    """Restores in flight: a copier adds them, a runner's steps wait for them. Used in one thread, the loop's."""

    def __init__(self) -> None:
        self._in_flight: list[Arrival] = []

    def add(self, arrival: Arrival) -> None:
        self._in_flight.append(arrival)

    def awaited(self) -> list[Arrival]:
        """Those whose pages may be read and have not all arrived."""
        self._in_flight = [arrival for arrival in self._in_flight if not arrival.is_done()]
        return [arrival for arrival in self._in_flight if arrival.is_awaited]
