"""Tensors that threads read ahead of their use.

One thread fills new memory at 2 GB/s, which is less than disks, shared memory and a link to a GPU carry.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.devices.scaled_tensor import ScaledTensor
from headwater.models.weights import PlacedArray, WeightSource

_NUM_THREADS = 8
_WINDOW = 16  # tensors that are read and not used yet, at most
Read = HostTensor | ScaledTensor | RandomTensor | PlacedArray


class ReadAhead:
    """A `WeightSource`: `names` of another one are read in threads, in about the order in which they will be used.

    The threads end with the `with` block. A read may hang for ever (of a network mount), so nothing joins them.
    """

    def __init__(
        self,
        source: WeightSource,
        names: Sequence[str],
        *,
        most_numbers: int | None = None,
        on_use: Callable[[int], None] | None = None,
    ) -> None:
        """`most_numbers`: of the tensors that are read and not used yet, all together; a larger one waits for its use.

        `on_use` hears how many numbers each tensor has that is handed out.
        """
        self.place: Path | str = source.place
        self._source: WeightSource | None = source  # None after the end: it may hold a model that is to be freed
        self._sizes = {name: math.prod(shape) for name, shape in source.shapes().items()}
        self._most = most_numbers
        self._on_use = on_use
        self._ahead = 0  # numbers that are being read, or read and not used yet
        small = [name for name in names if most_numbers is None or self._sizes[name] <= most_numbers]
        self._names = list(reversed(small))  # not begun
        self._open = set(small)  # not handed out
        self._read: dict[str, Read | Exception] = {}
        self._num_reading = 0
        self._is_over = False
        self._changed = threading.Condition()

    def __enter__(self) -> "ReadAhead":
        for _ in range(min(_NUM_THREADS, len(self._names))):
            threading.Thread(target=self._run, name="read-ahead", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._is_over, self._source = True, None
            self._read.clear()
            self._changed.notify_all()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._whole.shapes()

    @property
    def _whole(self) -> WeightSource:
        assert self._source is not None, "used after its block"
        return self._source

    def place_of(self, name: str) -> Path | str:
        return self._whole.place_of(name)

    def load(self, name: str) -> Read:
        if self._on_use is not None:
            self._on_use(self._sizes[name])
        with self._changed:
            if name not in self._open:
                return self._whole.load(name)
            self._open.discard(name)
            if name not in self._names:  # read, or being read
                self._changed.wait_for(lambda: name in self._read)
                found = self._read.pop(name)
                self._ahead -= self._sizes[name]
                self._changed.notify_all()
                if isinstance(found, Exception):
                    raise found
                return found
            self._names.remove(name)  # earlier than expected
        return self._whole.load(name)

    def _has_room(self) -> bool:
        """Whether one more tensor may be read now."""
        if len(self._read) + self._num_reading >= _WINDOW or not self._names:
            return not self._names
        return self._most is None or self._ahead + self._sizes[self._names[-1]] <= self._most

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._has_room())
                if self._is_over or not self._names:
                    return
                name = self._names.pop()
                self._num_reading += 1
                self._ahead += self._sizes[name]
                load = self._whole.load
            found: Read | Exception
            try:
                found = load(name)
            except Exception as error:  # noqa: BLE001  it is raised where the tensor is asked for
                found = error
            del load
            with self._changed:
                self._num_reading -= 1
                if not self._is_over:
                    self._read[name] = found
                self._changed.notify_all()
            del found  # or it would stay until the next one is read
