"""Forms that activations take between layers on a GPU, besides plain tensors."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import triton

from headwater.devices.cuda.kernels.layers import rms_norm


@dataclass(frozen=True, slots=True, eq=False)
class RoundedRows:
    """Activations [T, in]: `codes` float8_e4m3fn[T, in] times `scales` float32[T, in / group]."""

    codes: torch.Tensor
    scales: torch.Tensor
    group: int
    dtype: torch.dtype  # what was rounded, and what products of it have

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @classmethod
    def empty(cls, num_tokens: int, width: int, *, group: int, like: torch.Tensor) -> "RoundedRows":
        codes = torch.empty((num_tokens, width), dtype=torch.float8_e4m3fn, device=like.device)
        scales = torch.empty((num_tokens, triton.cdiv(width, group)), dtype=torch.float32, device=like.device)
        return cls(codes, scales, group, like.dtype)


@dataclass(frozen=True, eq=False)
class UnnormedRows:
    """The norm of the residual stream, float32[T, in], which its reader computes along with its product.

    It must be read before the residual changes.
    """

    residual: torch.Tensor
    weight: torch.Tensor
    eps: float
    offset: float

    def __len__(self) -> int:
        return len(self.residual)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.residual.device

    @property
    def arguments(self) -> "NormArguments":
        return self.residual, self.weight, self.eps, self.offset

    @cached_property
    def plain(self) -> torch.Tensor:
        """For a reader that cannot."""
        return rms_norm(self.residual, self.weight, self.eps, offset=self.offset)


Rows = torch.Tensor | RoundedRows | UnnormedRows
PlainRows = torch.Tensor | UnnormedRows
NormArguments = tuple[torch.Tensor, torch.Tensor, float, float]


class ReadsUnscaled(Protocol):
    """Attention, which may take queries, keys and values without their scales."""

    @property
    def reads_unscaled(self) -> bool: ...


class Like(Protocol):
    """What has a dtype and a place."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


def plain_rows(x: PlainRows) -> torch.Tensor:
    """[T, in], computed now if it is not yet."""
    return x.plain if isinstance(x, UnnormedRows) else x


def norm_arguments(x: PlainRows) -> NormArguments:
    """What a kernel reads that computes the norm where there is one: rows, the norm's weight, epsilon and offset."""
    return x.arguments if isinstance(x, UnnormedRows) else (x, x, 0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """What a product is still to be multiplied by: float32[T] for its rows, and float32[out] for its columns."""

    of_rows: torch.Tensor
    of_columns: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Unscaled:
    """A product [T, out] without its scales."""

    product: torch.Tensor
    scales: Scales


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What is still to be added to the residual stream: for each token, the sum of P rows, and `bias` [out].

    The sum is multiplied by `scales`, if they are given, before the bias is added. `rows` is [P, T, out], or with
    `weights`, float32[T, P], by which rows are multiplied, [T P, out]. Row P t + p of those lies at `places`,
    int32[T P], if they are given.
    """

    rows: torch.Tensor
    bias: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    places: torch.Tensor | None = None
    scales: "Scales | None" = None

    @property
    def num_parts(self) -> int:
        return self.rows.shape[0] if self.weights is None else self.weights.shape[1]
