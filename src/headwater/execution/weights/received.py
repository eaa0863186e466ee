"""Tensors of a staging folder: from its files, or from GPU memory of the process that received them (gpu_note.py)."""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.devices.device import ModelDevice
from headwater.devices.gpu_note import FILLING, FREED, read_note
from headwater.devices.host_tensor import HostTensor
from headwater.models.safetensors_file import FORMATS, SafetensorsFile
from headwater.models.weights import PlacedArray
from headwater.models.weights_safetensors import SafetensorsWeights
from headwater.staged_read import Abandoned

_LOOK_S = 0.01


class ReceivedWeights:
    """A `WeightSource`. Of a tensor in two files the last one counts. Files that are being filled are waited for.

    Where this device can open the memory that a note names, tensors come from there as arrays in the format `form`.
    """

    def __init__(
        self, files: Sequence[Path], device: ModelDevice, abandoned: threading.Event, *, form: str
    ) -> None:
        self._weights = SafetensorsWeights(files, last_counts=True)
        self.place = self._weights.place
        self._device = device
        self._abandoned = abandoned
        self._form = form
        self._shared: dict[Path, Any] = {}  # opened memory, by file
        for path in files:
            note = read_note(path)
            shared = None if note is None or note.state == FREED else device.open_shared(note.handle)
            if shared is not None:
                self._shared[path] = shared

    @property
    def names_on_device(self) -> set[str]:
        return {name for name in self._weights.shapes() if self._weights.file_of(name).path in self._shared}

    def place_of(self, name: str) -> Path:
        return self._weights.place_of(name)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._weights.shapes()

    def load(self, name: str) -> HostTensor | PlacedArray:
        file = self._weights.file_of(name)
        shared = self._shared.get(file.path)
        if shared is None:
            self._wait_until_filled(file.path)
            return self._weights.load(name)
        stored = file.tensors[name]
        first = stored.start - _data_start(file)
        array = self._device.take(
            shared, first, format=FORMATS[stored.dtype], shape=stored.shape, form=self._form
        )
        return PlacedArray(array)

    def use_files(self) -> None:
        """Take no tensor from a GPU's memory."""
        self._shared.clear()

    def check(self) -> None:
        """After the last copy. ValueError if memory was freed meanwhile, and may have held something else."""
        with self._device.packing():
            pass  # waits for the copies
        notes = [read_note(path) for path in self._shared]
        if any(note is None or note.state == FREED for note in notes):
            raise ValueError("the tensors in GPU memory were freed while they were read: send them again")
        self._shared.clear()

    def _wait_until_filled(self, path: Path) -> None:
        while (note := read_note(path)) is not None and note.state == FILLING:
            if self._abandoned.is_set():
                raise Abandoned
            time.sleep(_LOOK_S)


def _data_start(file: SafetensorsFile) -> int:
    return min(stored.start for stored in file.tensors.values())
