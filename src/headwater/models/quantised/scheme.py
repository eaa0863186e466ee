"""How the matrices of a quantised checkpoint are stored: what `quantization_config` says, in our words."""

import re
from dataclasses import dataclass
from typing import Literal

Layout = Literal["gptq", "awq", "packed", "int8", "float8", "mxfp4"]

# tensors of a module in each layout: the one that marks it, those beside it, and those that may be missing
MARKERS: dict[Layout, str] = {
    "gptq": "qweight",
    "awq": "qweight",
    "packed": "weight_packed",
    "int8": "weight",
    "float8": "weight",
}
_ALL = 0


@dataclass(frozen=True, slots=True)
class Scheme:
    """The layout of the matrices of some modules.

    `tile`: the outputs and the inputs that share a scale; 0 stands for all of them. `zero_offset`: what is added to
    stored zeros. `has_order`: groups of inputs may be in the order of activations.
    """

    layout: Layout
    bits: int
    tile: tuple[int, int]
    is_symmetric: bool = True
    zero_offset: int = 0
    has_order: bool = False
    scale_name: str = "weight_scale"

    def tile_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The tile in a matrix of this shape, without zeros."""
        high, wide = self.tile
        return (shape[0] if high == _ALL else high, shape[1] if wide == _ALL else wide)

    @property
    def needed(self) -> tuple[str, ...]:
        """The tensors that a module has, the marker first."""
        marker = MARKERS[self.layout]
        if self.layout in ("gptq", "awq"):
            return (marker, "qzeros", "scales")
        if self.layout == "packed":
            zeros = () if self.is_symmetric else ("weight_zero_point",)
            return (marker, "weight_scale", "weight_shape", *zeros)
        return (marker, self.scale_name, *(() if self.is_symmetric else ("weight_zero_point",)))

    @property
    def optional(self) -> tuple[str, ...]:
        if self.layout == "gptq":
            return ("g_idx",)
        return ("weight_g_idx", "weight_zero_point") if self.layout == "packed" else ("weight_zero_point",)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """The schemes of a checkpoint's modules. `method` is the name of the publisher's tool.

    A scheme holds for the modules that its targets name: a name, `re:` and an expression, or "Linear" for all.
    `ignored` are modules that are not quantised, in the same words, or parts of their names (`by_part`).
    """

    method: str
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignored: tuple[str, ...] = ()
    by_part: bool = True
    has_kv_scales: bool = False  # scales of 8-bit keys and values, which are not used

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of one linear layer, if it may be quantised. Embeddings are never."""
        if self.is_ignored(module) or module.endswith("embed_tokens"):
            return None
        for targets, scheme in self.schemes:
            if any(_is_target(target, module) for target in targets):
                return scheme
        return None

    def is_ignored(self, module: str) -> bool:
        if self.by_part:
            return any(f".{part}." in f".{module}." for part in self.ignored)
        return any(_is_target(target, module) for target in self.ignored)


def _is_target(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)
