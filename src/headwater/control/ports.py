"""What operations need from the side that computes. `launch` and the simulation each have an implementation."""

from collections.abc import Sequence
from typing import Any, Protocol


class Staged(Protocol):
    """What a thread reads, checks or computes."""

    def is_ready(self) -> bool:
        """Whether it has ended, well or badly."""
        ...

    def error(self) -> str | None:
        """Why the result cannot be used; None if it can. Only when ready."""
        ...

    def abandon(self) -> None:
        """Stop and free what was read: the result will not be used. Never blocks."""
        ...


class StagedHashes(Staged, Protocol):
    """Hashes of the tensors in place."""

    def found(self) -> dict[str, str]:
        """16 hex digits by name. Only when ready and without error."""
        ...


class StagedWeights(Staged, Protocol):
    """New weights; the model is not touched yet."""

    @property
    def weights_id(self) -> str:
        """The identity of the weights as they will be after the swap. Only when ready and without error."""
        ...

    @property
    def num_tensors(self) -> int: ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, from the checkpoint's own files. Only when ready and without error."""
        ...

    @property
    def has_changed(self) -> bool:
        """Of a reload: the files hold other weights than were released. Only when ready, with or without error."""
        ...

    @property
    def overwrite(self) -> Any | None:
        """Not None: they are only checked, and `WeightsPort.overwrite` has to put them in place before `swap`."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether every earlier weight is replaced. Only when ready and without error."""
        ...


class WeightsPort(Protocol):
    """The model's weights."""

    def stage(self, path: str, load_format: str) -> StagedWeights:
        """Begin to load; never blocks, never raises for the user's mistakes."""
        ...

    def stage_received(self, path: str, weights_id: str, *, in_place: bool = False) -> StagedWeights:
        """Begin to load the tensors of a staging folder, which are known as `weights_id` once they are in place.

        `in_place`: only check them. `overwrite` then puts them in place of the old ones, layer by layer.
        """
        ...

    def overwrite(self, staged: Any) -> Staged:
        """Begin to put what `stage_received` has checked in place of the old weights. Until `swap` no step may run.

        Half-way they are neither the old nor the new ones: an error means that they are incomplete.
        """
        ...

    def parameters(self) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        """The shape of every tensor of the whole model, and the ends of names that are ignored in checkpoints."""
        ...

    def hash(self) -> StagedHashes:
        """Begin to hash every tensor in place: what all ranks hold of it."""
        ...

    def reload(self, *, accepts_changes: bool = False) -> StagedWeights:
        """Begin to load again, after a release, what was loaded last.

        Files that hold other weights now are an error unless `accepts_changes`.
        """
        ...

    def swap(self, staged: Any) -> None:
        """Put what `stage` or `reload` returned in place of the old weights. No step is in flight."""
        ...

    def release(self) -> int:
        """Free the weights' memory; returns bytes. No step is in flight."""
        ...

    def values(self, name: str, num_values: int) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
        """dtype, shape and first values of a parameter. KeyError if there is none of that name."""
        ...

    def part(self, name: str, num_values: int) -> tuple[str, Any]:
        """dtype of a parameter, and what this rank holds of its first `num_values` values: float32, in whole rows."""
        ...

    def join(self, name: str, num_values: int, parts: Sequence[Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Shape and first values of a parameter, from the parts of all ranks."""
        ...


class StagedAdapter(Staged, Protocol):
    """An adapter that is read, checked and converted."""

    @property
    def adapter_id(self) -> str:
        """A hash of its content. Only when ready and without error, as all that follows."""
        ...

    @property
    def rank(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


class AdaptersPort(Protocol):
    """The runner's memory for LoRA adapters: slots from 1 to `num_slots`."""

    @property
    def num_slots(self) -> int: ...

    def stage(self, path: str) -> StagedAdapter:
        """Begin to read; never blocks, never raises for the user's mistakes."""
        ...

    def place(self, slot: int, staged: Any) -> None:
        """Put what `stage` returned into a slot that no row of a later step has yet."""
        ...

    def clear(self, slot: int) -> None:
        """Empty a slot that no row of a later step has."""
        ...


class KvMemoryPort(Protocol):
    """The memory behind the device's pages."""

    def release(self) -> int:
        """Free it; returns bytes. Its contents are no longer needed."""
        ...

    def resume(self) -> int:
        """Allocate it again, contents undefined; returns bytes."""
        ...
