"""Experts of a Hugging Face folder that has one tensor for a matrix of all experts of a layer, as gpt-oss has them.

- gate_up_proj [experts, in, 2 inner], with gate in the even columns and up in the odd ones; gate_up_proj_bias likewise.
- down_proj [experts, inner, in]; down_proj_bias [experts, in].
- In MXFP4 (OCP Microscaling Formats 1.0), NAME_blocks and NAME_scales in place of them.
- NAME_blocks is uint8[experts, out, in / 32, 16]. The low bits of a byte are an even input, the high bits the next.
- NAME_scales is uint8[experts, out, in / 32]: exponents of 2, plus 127.

Here they have the names of single experts: "experts.3.gate_proj.weight" [inner, in].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headwater.devices.host_tensor import HostTensor
from headwater.devices.own_memory import empty
from headwater.devices.scaled_tensor import BLOCK, move_pairs
from headwater.models.experts.config import ExpertsConfig
from headwater.models.model_files import ModelFileError
from headwater.models.weights_safetensors import PLAIN_TYPES, SafetensorsWeights

STACKED_TYPES = (*PLAIN_TYPES, "U8")
_STACKS = ("gate_up_proj", "gate_up_proj", "down_proj")  # that hold gate, up and down of all experts
_BLOCK_BYTES = BLOCK // 2
_NUM_DIMS = {"": 3, "_bias": 2, "_blocks": 4, "_scales": 3}


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a parameter of one expert lies: the name of its stack, without the ending, and which matrix it is."""

    stack: str
    expert: int
    which: int
    is_bias: bool


class StackedExperts:
    """A `WeightSource` of single experts, and of all other tensors of the folder as they are."""

    def __init__(self, weights: SafetensorsWeights, experts: ExpertsConfig, *, num_layers: int) -> None:
        """ModelFileError for a stack of another type or shape than its layout has."""
        self.place: Path | str = weights.place
        self._weights = weights
        self._stored = weights.stored()
        self._parts: dict[str, _Part] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        taken: set[str] = set()
        for layer in range(num_layers):
            stem = f"model.layers.{layer}.{experts.names.experts}"
            names = experts.matrices(layer)
            for which, stack in enumerate(_STACKS):
                taken |= self._find(f"{stem}.{stack}", which, [each[which] for each in names])
        plain = {name: stored for name, stored in self._stored.items() if name not in taken}
        for name, stored in plain.items():
            if stored.dtype not in PLAIN_TYPES:
                raise self._refuse(name, f"is of type {stored.dtype}, and belongs to no experts in MXFP4")
        self._shapes |= {name: stored.shape for name, stored in plain.items()}

    def place_of(self, name: str) -> Path:
        part = self._parts.get(name)
        return self._weights.place_of(name if part is None else self._tensors_of(part)[0])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def load(self, name: str) -> HostTensor:
        part = self._parts.get(name)
        if part is None:
            return self._weights.load(name)
        found = [self._weights.load(each, part=part.expert) for each in self._tensors_of(part)]
        of_gated = slice(None) if part.which == 2 else slice(part.which, None, 2)
        if len(found) == 2:
            return _mxfp4(*(each.data[of_gated] for each in found))
        (tensor,) = found
        data = tensor.data[..., of_gated] if part.is_bias else tensor.data[:, of_gated].T
        return HostTensor(tensor.format, data.shape, np.ascontiguousarray(data))

    def _find(self, stack: str, which: int, names: list[str]) -> set[str]:
        """Take in what there is of a stack for the modules `names`. Returns the names of its tensors."""
        found = {ending for ending in _NUM_DIMS if stack + ending in self._stored}
        shapes = {ending: self._stored[stack + ending].shape for ending in found}
        for ending, shape in shapes.items():
            stored = self._stored[stack + ending]
            is_bytes, fits = stored.dtype == "U8", len(shape) == _NUM_DIMS[ending] and shape[0] == len(names)
            if not fits or is_bytes != (ending in ("_blocks", "_scales")):
                raise self._refuse(
                    stack + ending, f"is {stored.dtype}{list(shape)}: no stack of the {len(names)} experts of its layer"
                )
        if "_blocks" in found or "_scales" in found:
            self._check_blocks(stack, shapes)
        halves = 1 if which == 2 else 2
        for expert, name in enumerate(names):
            if "_blocks" in found:
                _, num_rows, num_blocks, _ = shapes["_blocks"]
                self._shapes[f"{name}.weight"] = (num_rows // halves, num_blocks * BLOCK)
            elif "" in found:
                self._shapes[f"{name}.weight"] = (shapes[""][2] // halves, shapes[""][1])
            if "_bias" in found:
                self._shapes[f"{name}.bias"] = (shapes["_bias"][1] // halves,)
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" in self._shapes:
                    self._parts[f"{name}.{kind}"] = _Part(stack, expert, which, is_bias=kind == "bias")
        return {stack + ending for ending in found}

    def _check_blocks(self, stack: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for ending, other in (("_blocks", "_scales"), ("_scales", "_blocks")):
            if other not in shapes:
                raise self._refuse(stack + ending, f"has no {stack}{other} beside it, which MXFP4 needs")
        if "" in shapes:
            raise self._refuse(stack, "is there in MXFP4 as well: which one counts?")
        blocks, scales = shapes["_blocks"], shapes["_scales"]
        if blocks[:3] != scales or blocks[3] != _BLOCK_BYTES:
            raise self._refuse(
                stack + "_blocks", f"of shape {list(blocks)} does not fit {stack}_scales of shape {list(scales)}"
            )

    def _tensors_of(self, part: _Part) -> list[str]:
        if part.is_bias:
            return [part.stack + "_bias"]
        is_plain = part.stack in self._stored
        return [part.stack] if is_plain else [part.stack + "_blocks", part.stack + "_scales"]

    def _refuse(self, name: str, reason: str) -> ModelFileError:
        return ModelFileError(self._weights.file_of(name).path, f"tensor {name!r} {reason}")


def _mxfp4(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> HostTensor:
    """[out, in / 32, 16] and [out, in / 32] in GGUF's blocks: the exponent, then 16 bytes of inputs i and i + 16."""
    num_rows, num_blocks, _ = blocks.shape
    out = empty((num_rows, num_blocks, 1 + _BLOCK_BYTES), np.uint8)
    out[:, :, 0] = scales
    move_pairs(blocks, out[:, :, 1:])
    return HostTensor("MXFP4", (num_rows, num_blocks * BLOCK), out.reshape(num_rows, -1))
