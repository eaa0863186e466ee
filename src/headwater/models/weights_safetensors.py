"""Weights of a Hugging Face folder: one or many .safetensors files, memory-mapped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headwater.models.model_files import ModelFileError, is_there, open_regular, read_json_object

INDEX_NAME = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsWeights:
    """The tensors of `files`. A tensor in two files is an error (which of them would be meant?)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.place = files[0] if len(files) == 1 else files[0].parent
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            for name, dtype, shape in _tensors_in(path):
                if name in self._files:
                    raise ModelFileError(path, f"tensor {name!r} is in both {self._files[name].name} and {path.name}")
                if dtype not in _DTYPES:
                    raise ModelFileError(
                        path, f"tensor {name!r} is of type {dtype}; weights are read of {', '.join(_DTYPES)}"
                    )
                self._files[name] = path
                self._shapes[name] = shape

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def load(self, name: str) -> torch.Tensor:
        # Opened anew for each tensor: a handle kept open keeps every page that was read in this process' memory.
        path = self._files[name]
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(path, f"tensor {name!r} cannot be read ({error})") from None


def read_index(folder: Path) -> dict[str, str] | None:
    """Which file holds which tensor, as the folder's index says; None if it has none.

    ModelFileError for an index that is damaged, or names a file outside of the folder or one that is not there.
    """
    path = folder / INDEX_NAME
    if not is_there(path):
        return None
    names: Any = read_json_object(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelFileError(path, "is damaged: weight_map must map each tensor's name to a file's")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise ModelFileError(path, f"names the file {name!r}, which is not in its folder")
        if not is_there(folder / name):
            raise ModelFileError(path, f"names the file {name!r}, which is not there")
    return names


def check_index(folder: Path, weights: SafetensorsWeights) -> None:
    """Raise ModelFileError if the folder's index, where it has one, names a tensor that is not there.

    A folder without an index may hold any part of the tensors, and a checkpoint that has lost one of its files,
    or is still being written, would pass for such a part.
    """
    missing = sorted(set(read_index(folder) or ()) - set(weights.shapes()))
    if missing:
        raise ModelFileError(
            folder / INDEX_NAME,
            f"names tensor {missing[0]!r}, which is in none of the folder's files ({len(missing)} are missing)",
        )


def _tensors_in(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each tensor of a file."""
    open_regular(path).close()
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 - it is not a mapping
            return [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(path, f"is no whole safetensors file ({error})") from None
