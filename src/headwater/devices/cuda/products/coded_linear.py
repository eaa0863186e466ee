"""Linear layers on a GPU over codes of 4 and 8 bits: kernels/coded/ for few tokens, plain numbers for many.

Matrices that a layer packs may differ in their codes, as in a file of K-quants: each run of like ones is one product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from headwater.devices.cuda.kernels.coded.int4_tiles import int4_parts, int4_tiles, splits_int4, suits_int4_tiles
from headwater.devices.cuda.kernels.coded.numbers import to_numbers
from headwater.devices.cuda.kernels.coded.one_float8 import gated_float8, one_float8, suits_one_float8
from headwater.devices.cuda.kernels.coded.one_token import one_token
from headwater.devices.cuda.kernels.coded.tiles import suits_tiles, tile_parts, tiles
from headwater.devices.cuda.kernels.rounded import can_round_rows, round_tokens
from headwater.devices.cuda.kernels.rows import (
    Like,
    Parts,
    PlainRows,
    ReadsUnscaled,
    RoundedRows,
    Rows,
    UnnormedRows,
    Unscaled,
    plain_rows,
)
from headwater.devices.cuda.products.coded_matrix import CodedMatrix, join
from headwater.devices.cuda.products.linear import CudaLinear
from headwater.devices.cuda.products.scaled_product import (
    scaled_parts,
    scaled_product,
    suits_scaled_product,
    suits_unscaled,
    unit_scale,
    unscaled_product,
)
from headwater.devices.device import Activation

Weight = torch.Tensor | CodedMatrix


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some outputs: those from `first` on."""

    weight: Weight
    bias: torch.Tensor | None
    first: int

    @property
    def device(self) -> torch.device:
        return (self.weight.codes if isinstance(self.weight, CodedMatrix) else self.weight).device

    @property
    def stop(self) -> int:
        return self.first + self.weight.shape[0]


class CodedLinear:
    """A linear layer (device.Linear) of which at least one matrix is coded. `rounding` says in which form it reads."""

    def __init__(
        self,
        weights: Sequence[Weight],
        biases: Sequence[torch.Tensor] | None = None,
        *,
        is_deterministic: bool = False,
    ) -> None:
        self.is_deterministic = is_deterministic
        self._sizes = [weight.shape[0] for weight in weights]
        self.in_features, self.out_features = weights[0].shape[1], sum(self._sizes)
        self._parts: list[_Part] = []
        for _, run in groupby(zip(weights, biases or [None] * len(weights), strict=True), _Kinds()):
            some, their_biases = zip(*run, strict=True)
            weight = join(some) if isinstance(some[0], CodedMatrix) else torch.cat(some)
            bias = None if biases is None else torch.cat(their_biases)
            self._parts.append(_Part(weight, bias, first=self._parts[-1].stop if self._parts else 0))
        unit_scale(self._parts[0].device)

    def __call__(self, x: Rows, *, reader: ReadsUnscaled | None = None) -> torch.Tensor | Unscaled:
        if reader is not None and reader.reads_unscaled and (found := self.unscaled(x)) is not None:
            return found
        return self.product(x)

    def product(self, x: Rows) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        y = torch.empty((len(x), self.out_features), dtype=x.dtype, device=x.device)
        self._write(x, y, adds=False)
        return y

    def rounding(self, num_tokens: int, like: Like) -> int | None:
        """The inputs that share a scale, if so many tokens of `like`'s dtype are wanted in float8; else None."""
        if self.is_deterministic:
            return None
        groups = {
            part.weight.group
            if isinstance(part.weight, CodedMatrix) and suits_scaled_product(like, part.weight, num_tokens)
            else None
            for part in self._parts
        }
        group = groups.pop() if len(groups) == 1 else None
        return group if group is not None and can_round_rows(self.in_features, group) else None

    def norms(self, num_tokens: int) -> bool:
        """Whether the norm of so many tokens is best computed along with the product."""
        is_one = num_tokens == 1 and not self.is_deterministic
        return is_one and all(_suits_one_float8(part.weight) for part in self._parts)

    def parts(self, x: torch.Tensor | RoundedRows) -> Parts | None:
        """The product as a sum that is still to be made; None where `add_to` makes it on the way."""
        part = self._parts[0]
        weight = part.weight
        if self.is_deterministic or len(self._parts) > 1 or not isinstance(weight, CodedMatrix):
            return None
        if isinstance(x, torch.Tensor) and suits_int4_tiles(x, weight):
            return Parts(int4_parts(x.contiguous(), weight), part.bias)
        if len(x) < 2:
            return None
        rounded = _rounded(x, weight)
        if rounded is not None:
            return scaled_parts(rounded, weight, part.bias)
        assert isinstance(x, torch.Tensor)
        return Parts(tile_parts(x.contiguous(), weight), part.bias) if suits_tiles(len(x), weight) else None

    def split_sums(self, x: Rows) -> torch.Tensor | None:
        """The product as a sum that is still to be made, float32[P, T, out], where it is computed in parts."""
        part = self._parts[0]
        if self.is_deterministic or len(self._parts) > 1 or part.bias is not None or not isinstance(x, torch.Tensor):
            return None
        if not isinstance(part.weight, CodedMatrix) or not splits_int4(x, part.weight):
            return None
        return int4_parts(x.contiguous(), part.weight)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor | RoundedRows) -> None:
        self._write(x, residual, adds=True)

    def logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.empty((len(x), self.out_features), dtype=torch.float32, device=x.device) if out is None else out
        self._write(x, y, adds=False)
        return y

    def embed(self, token_ids: torch.Tensor, *, first_token: int | None = None, scale: float = 1.0) -> torch.Tensor:
        (part,) = self._parts
        assert isinstance(part.weight, CodedMatrix)
        rows = token_ids - (first_token or 0)
        inside = rows.clamp(0, self.out_features - 1)
        found = to_numbers(part.weight, torch.float32, inside)
        if scale != 1.0:
            found *= scale
        return found if first_token is None else found * (rows == inside)[:, None]

    def unpack(self) -> list[tuple[Weight, torch.Tensor | None]]:
        found: list[tuple[Weight, torch.Tensor | None]] = []
        sizes = iter(self._sizes)
        for part in self._parts:
            at, size = 0, part.weight.shape[0]
            while at < size:
                stop = at + next(sizes)
                rows = part.weight.rows(at, stop) if isinstance(part.weight, CodedMatrix) else part.weight[at:stop]
                found.append((rows, None if part.bias is None else part.bias[at:stop]))
                at = stop
        return found

    def gates(self, num_tokens: int) -> bool:
        """Whether one kernel computes both halves of a gated layer at once."""
        return self.norms(num_tokens) and len(self._parts) == 1

    def gated(self, x: PlainRows, activation: Activation) -> torch.Tensor:
        """activation of the first half of the outputs times the second half. [1, in] -> [1, out / 2]"""
        weight, bias = self._parts[0].weight, self._parts[0].bias
        assert isinstance(weight, CodedMatrix)
        return gated_float8(x, weight, bias, activation)

    def unscaled(self, x: Rows) -> Unscaled | None:
        """The product without its scales, where that is the faster way."""
        part = self._parts[0]
        if len(self._parts) > 1 or part.bias is not None or not isinstance(x, RoundedRows):
            return None
        assert isinstance(part.weight, CodedMatrix)
        return unscaled_product(x, part.weight) if suits_unscaled(x, part.weight) else None

    def _write(self, x: Rows, y: torch.Tensor, *, adds: bool) -> None:
        if not len(x):
            return
        if isinstance(x, UnnormedRows) and not self.norms(len(x)):
            x = x.plain
        if isinstance(x, torch.Tensor):
            x = x.contiguous()
        for part in self._parts:
            self._write_part(part, x, y[:, part.first : part.stop], adds=adds)

    def _write_part(self, part: _Part, x: Rows, y: torch.Tensor, *, adds: bool) -> None:
        weight = part.weight
        if isinstance(weight, CodedMatrix):
            if not self.is_deterministic:
                if not isinstance(x, RoundedRows) and len(x) == 1 and suits_one_float8(weight):
                    return one_float8(x, weight, part.bias, y, adds=adds)
                x = x if isinstance(x, RoundedRows) else plain_rows(x)
                rounded = _rounded(x, weight)
                if rounded is not None:
                    return scaled_product(rounded, weight, part.bias, y, adds=adds)
                assert isinstance(x, torch.Tensor)
                if suits_int4_tiles(x, weight):
                    return int4_tiles(x, weight, part.bias, y, adds=adds)
                if len(x) == 1:
                    return one_token(x, weight, part.bias, y, adds=adds)
                if suits_tiles(len(x), weight):
                    return tiles(x, weight, part.bias, y, adds=adds)
            weight = to_numbers(weight, x.dtype)
        assert isinstance(x, torch.Tensor), "read in another form than was asked for"
        plain = CudaLinear([weight], None if part.bias is None else [part.bias], is_deterministic=self.is_deterministic)
        if adds and len(self._parts) == 1:
            return plain.add_to(y, x)
        return _put(y, plain.logits(x) if y.dtype == torch.float32 else plain(x), adds=adds)


class _Kinds:
    """Numbers the runs of like matrices."""

    def __init__(self) -> None:
        self._last: Weight | None = None
        self._number = 0

    def __call__(self, pair: tuple[Weight, torch.Tensor | None]) -> int:
        weight = pair[0]
        if self._last is not None:
            is_like = weight.is_like(self._last) if isinstance(weight, CodedMatrix) else _is_plain(self._last)
            self._number += not is_like
        self._last = weight
        return self._number


def _suits_one_float8(weight: Weight) -> bool:
    return isinstance(weight, CodedMatrix) and suits_one_float8(weight)


def _rounded(x: torch.Tensor | RoundedRows, weight: CodedMatrix) -> RoundedRows | None:
    """The tokens in float8, if they are that, or if it is the way to multiply them."""
    if isinstance(x, RoundedRows):
        return x
    return round_tokens(x.contiguous(), weight.group) if suits_scaled_product(x, weight, len(x)) else None


def _is_plain(weight: Weight) -> bool:
    return isinstance(weight, torch.Tensor)


def _put(y: torch.Tensor, product: torch.Tensor, *, adds: bool) -> None:
    if adds:
        y += product
    else:
        y.copy_(product)
