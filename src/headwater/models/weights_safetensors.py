"""Weights of a Hugging Face folder: one or many .safetensors files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.devices.host_tensor import HostTensor
from headwater.devices.safetensors_header import StoredTensor
from headwater.models.model_files import ModelFileError, is_there, read_json_object
from headwater.models.safetensors_file import SafetensorsFile

INDEX_NAME = "model.safetensors.index.json"
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsWeights:
    """The tensors of `files`. A tensor in two files is an error: it is ambiguous, unless the last file counts.

    Their types must be among `dtypes`, in the words of safetensors.
    """

    def __init__(
        self, files: Sequence[Path], *, last_counts: bool = False, dtypes: Sequence[str] = PLAIN_TYPES
    ) -> None:
        self.place = files[0] if len(files) == 1 else files[0].parent
        self._files: dict[str, SafetensorsFile] = {}
        for file in map(SafetensorsFile, files):
            for name, stored in file.tensors.items():
                if name in self._files and not last_counts:
                    other = self._files[name].path.name
                    raise ModelFileError(file.path, f"tensor {name!r} is in both {other} and {file.path.name}")
                if stored.dtype not in dtypes:
                    reason = f"tensor {name!r} is of type {stored.dtype}; weights are read of {', '.join(dtypes)}"
                    raise ModelFileError(file.path, reason)
                self._files[name] = file

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.stored().items()}

    def stored(self) -> Mapping[str, StoredTensor]:
        """Type, shape and place in its file of every tensor."""
        return {name: file.tensors[name] for name, file in self._files.items()}

    def place_of(self, name: str) -> Path:
        return self._files[name].path

    def file_of(self, name: str) -> SafetensorsFile:
        return self._files[name]

    def load(self, name: str, *, part: int | None = None) -> HostTensor:
        """A tensor, or element `part` of its outermost dimension."""
        return self._files[name].load(name, part=part)


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor by the folder's index; None if there is no index.

    ModelFileError for an index that is damaged, or names a file outside of the folder.
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
    return names


def check_files(folder: Path) -> None:
    """Raise ModelFileError if the folder's index names a missing file."""
    for name in sorted(set((read_index(folder) or {}).values())):
        if not is_there(folder / name):
            raise ModelFileError(folder / INDEX_NAME, f"names the file {name!r}, which is not there")


def check_index(folder: Path, weights: SafetensorsWeights) -> None:
    """Raise ModelFileError if the folder's index names a missing tensor.

    A folder without an index may hold any part of the tensors. With one, a checkpoint that lost a file or is still
    being written is found.
    """
    missing = sorted(set(read_index(folder) or ()) - set(weights.shapes()))
    if missing:
        raise ModelFileError(
            folder / INDEX_NAME,
            f"names tensor {missing[0]!r}, which is in none of the folder's files ({len(missing)} are missing)",
        )
