"""Weights and KV memory without a model, for the fake runner, with scripted failures."""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from headwater.simulation.fakes.kv_records import Records


class FakeStaged:
    """What is ready after `num_polls` polls (`control.ports.Staged`)."""

    def __init__(self, *, num_polls: int, error: str | None) -> None:
        self.is_abandoned = False
        self._polls_left = num_polls
        self._error = error

    def is_ready(self) -> bool:
        self._polls_left -= 1
        return self._polls_left < 0

    @property
    def has_ended(self) -> bool:
        return self._polls_left < 0

    def error(self) -> str | None:
        return self._error

    def abandon(self) -> None:
        self.is_abandoned = True


class FakeStagedWeights(FakeStaged):
    """Weights that are being read. Their id is the requested path."""

    num_tensors = 1
    end_ids = ()
    is_whole = True

    def __init__(
        self, weights_id: str, *, num_polls: int, error: str | None, has_changed: bool = False, in_place: bool = False
    ) -> None:
        super().__init__(num_polls=num_polls, error=error)
        self.has_changed = has_changed
        self.overwrite = "in place" if in_place else None
        self.weights_id = weights_id


class FakeHashes(FakeStaged):
    """Hashes of weights: their name."""

    def __init__(self, weights_id: str, *, num_polls: int) -> None:
        super().__init__(num_polls=num_polls, error=None)
        self._weights_id = weights_id

    def found(self) -> dict[str, str]:
        return {"weight": self._weights_id, "bias": self._weights_id}


class FakeWeights:
    """Weights that are only a name. A path that begins with "corrupt" cannot be loaded."""

    def __init__(self, current: str = "w0") -> None:
        self.current = current
        self.is_in_use: Callable[[], bool] = lambda: False  # by a step in flight
        self.num_polls = 3  # of the next staged weights
        self.is_released = False
        self.staged: deque[FakeStagedWeights] = deque(maxlen=4)  # the latest ones
        self.overwriting_fails: str | None = None  # the error of the next overwriting in place
        self.on_disk: str | None = None  # the contents of the files, if they were overwritten

    def stage(self, path: str, load_format: str) -> FakeStagedWeights:
        error = f"{path} is broken" if path.startswith("corrupt") else None
        return self._begin(FakeStagedWeights(path, num_polls=self.num_polls, error=error))

    def stage_received(self, path: str, weights_id: str, *, in_place: bool = False) -> FakeStagedWeights:
        return self._begin(FakeStagedWeights(weights_id, num_polls=self.num_polls, error=None, in_place=in_place))

    def overwrite(self, staged: FakeStagedWeights) -> FakeStaged:
        assert not self.is_in_use(), "weights are overwritten under a step in flight"
        return FakeStaged(num_polls=self.num_polls, error=self.overwriting_fails)

    def parameters(self) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        return {"weight": (1,), "bias": (2,)}, ("inv_freq",)

    def hash(self) -> FakeHashes:
        return FakeHashes(self.current, num_polls=self.num_polls)

    def reload(self, *, accepts_changes: bool = False) -> FakeStagedWeights:
        found = self.on_disk or self.current
        has_changed = found != self.current
        error = f"{self.current} was released, {found} found" if has_changed and not accepts_changes else None
        return self._begin(FakeStagedWeights(found, num_polls=self.num_polls, error=error, has_changed=has_changed))

    def _begin(self, staged: FakeStagedWeights) -> FakeStagedWeights:
        self.staged.append(staged)
        return staged

    def swap(self, staged: FakeStagedWeights) -> None:
        assert not self.is_in_use(), "weights are swapped under a step in flight"
        self.current = staged.weights_id
        self.on_disk = None
        self.is_released = False

    def release(self) -> int:
        assert not self.is_released and not self.is_in_use()
        self.is_released = True
        return 1

    def values(self, name: str, num_values: int) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
        dtype, part = self.part(name, num_values)
        return (dtype, *self.join(name, num_values, [part]))

    def part(self, name: str, num_values: int) -> tuple[str, npt.NDArray[np.float32]]:
        if name != "weight":
            raise KeyError(name)
        return "float32", np.ones(1, dtype=np.float32)

    def join(
        self, name: str, num_values: int, parts: Sequence[npt.NDArray[np.float32]]
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Every fake rank has all of it."""
        return (1,), tuple(parts[-1][:num_values].tolist())


class FakeStagedAdapter(FakeStaged):
    """An adapter that is being read. Its id is the requested path."""

    rank = 8
    num_bytes = 1

    def __init__(self, adapter_id: str, *, num_polls: int, error: str | None) -> None:
        super().__init__(num_polls=num_polls, error=error)
        self.adapter_id = adapter_id


class FakeAdapters:
    """Adapters that are only names, by slot. A path that begins with "corrupt" cannot be loaded."""

    num_slots = 4

    def __init__(self) -> None:
        self.by_slot: dict[int, str] = {}
        self.num_polls = 3  # of the next staged adapter
        self.on_disk: dict[str, str] = {}  # the content of paths that were overwritten

    def stage(self, path: str) -> FakeStagedAdapter:
        error = f"{path} is broken" if path.startswith("corrupt") else None
        return FakeStagedAdapter(self.on_disk.get(path, path), num_polls=self.num_polls, error=error)

    def place(self, slot: int, staged: FakeStagedAdapter) -> None:
        assert staged.has_ended and staged.error() is None, "an adapter is placed that was not read"
        self.by_slot[slot] = staged.adapter_id

    def clear(self, slot: int) -> None:
        self.by_slot.pop(slot, None)

    def content_of(self, slot: int) -> str:
        """What a slot holds; "" for slot 0, of rows without an adapter."""
        return self.by_slot.get(slot, f"nothing in slot {slot}") if slot else ""


class FakeKvMemory:
    """A release erases every canary, so that a later read of a page is noticed."""

    def __init__(self, kv: Records) -> None:
        self._kv = kv
        self.is_released = False
        self.is_in_use: Callable[[], bool] = lambda: False  # by a step in flight

    def release(self) -> int:
        assert not self.is_released and not self.is_in_use()
        self.is_released = True
        self._kv.view(np.uint8)[:] = 0
        return self._kv.nbytes

    def resume(self) -> int:
        assert self.is_released
        self.is_released = False
        return self._kv.nbytes
