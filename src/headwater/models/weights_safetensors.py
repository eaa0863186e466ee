"""Weights of a Hugging Face folder: one or many .safetensors files, memory-mapped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

INDEX_NAME = "model.safetensors.index.json"


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


def check_index(folder: Path, weights: SafetensorsWeights) -> None:
    """Raise ValueError if the folder's index, where it has one, names a tensor that is not there.

    A folder without an index may hold any part of the tensors, and a checkpoint that has lost one of its files,
    or is still being written, would pass for such a part.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        return
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error}") from None
    missing = sorted(set(names) - set(weights.shapes()))
    if missing:
        raise ValueError(
            f"{index} names tensor {missing[0]!r}, which is in none of the folder's files ({len(missing)} are missing)"
        )
