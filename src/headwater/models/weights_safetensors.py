"""Weights of a Hugging Face folder: one or many .safetensors files, memory-mapped."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open


class SafetensorsWeights:
    """The tensors of `files`. A tensor in two files is an error (which of them would be meant?)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    if name in self._files:
                        raise ValueError(f"tensor {name!r} is in both {self._files[name].name} and {path.name}")
                    self._files[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def load(self, name: str) -> torch.Tensor:
        # Opened anew for each tensor: a handle kept open keeps every page that was read in this process' memory.
        with safe_open(self._files[name], framework="pt", device="cpu") as file:
            return file.get_tensor(name)
