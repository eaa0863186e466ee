"""A layer of experts on a GPU (device.Experts): the matrices of all experts in two tensors, and Triton's kernels."""

from collections.abc import Iterable
from typing import Self

import torch

from headwater.devices.cuda.kernels.experts.few import MOST_TOKENS, few_gated_rows, few_sums
from headwater.devices.cuda.kernels.experts.grouped import down_rows, gated_rows, sum_by_weight, tile_shape
from headwater.devices.cuda.kernels.experts.ordered import grouped_product, order_rows, suits_ordered
from headwater.devices.cuda.kernels.experts.route import Counts, route
from headwater.devices.cuda.kernels.layers import activate_mul
from headwater.devices.cuda.kernels.row_tiles import empty_plan, plan_tiles
from headwater.devices.cuda.kernels.rows import Like, Parts, PlainRows, plain_rows
from headwater.devices.cuda.products.mxfp4_matrix import MXFP4, Mxfp4Matrix, Stack
from headwater.devices.device import Activation, ExpertBiases, Routing
from headwater.devices.errors import MixedFormatsError


class CudaExperts:
    """Experts whose gate and up are one tensor, [E, 2 inner, in], and whose down is another, [E, in, inner]."""

    def __init__(
        self,
        gate_up: Stack,
        down: Stack,
        *,
        routing: Routing,
        is_deterministic: bool = False,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        activation: Activation = "silu",
    ) -> None:
        """`is_deterministic`: a row's bits do not depend on the other rows. `biases`: [E, 2 inner] and [E, in]."""
        if activation not in ("silu", "clamped_swiglu"):
            raise ValueError(f"activation {activation!r} of experts has no kernel on a GPU")
        self._gate_up = gate_up
        self._down = down
        self._routing = routing
        self._is_deterministic = is_deterministic
        self._gate_up_bias, self._down_bias = biases or (None, None)
        self._is_clamped = activation == "clamped_swiglu"

    @classmethod
    def of(
        cls,
        experts: Iterable[tuple[Stack, Stack, Stack]],
        *,
        num_experts: int,
        routing: Routing,
        is_deterministic: bool,
        biases: ExpertBiases | None = None,
        activation: Activation = "silu",
    ) -> Self:
        """Copies of the experts, as they come: one of them is in memory beside the layer."""
        gate_up: Stack = torch.empty(0)
        down: Stack = torch.empty(0)
        wanted: tuple[str, tuple[int, ...]] = ("", ())
        for index, (gate, up, own_down) in enumerate(experts):
            inner, width = gate.shape
            if index == 0:
                gate_up = _empty_stack(gate, num_experts, 2 * inner, width)
                down = _empty_stack(own_down, num_experts, width, inner)
                wanted = (_format_of(gate), (inner, width))
            shapes = (tuple(gate.shape), tuple(up.shape), tuple(own_down.shape)[::-1])
            formats = (_format_of(gate), _format_of(up), _format_of(own_down))
            found = set(zip(formats, shapes, strict=True))
            if found != {wanted}:
                raise MixedFormatsError(f"the experts of a layer have one format and shape, not {wanted} and {found}")
            for target, source in (
                (gate_up[index, :inner], gate),
                (gate_up[index, inner:], up),
                (down[index], own_down),
            ):
                target.copy_(source)  # type: ignore[arg-type]
        stacked = None
        if biases is not None:
            stacked = torch.stack([torch.cat(each[:2]) for each in biases]), torch.stack([each[2] for each in biases])
        return cls(
            gate_up, down, routing=routing, is_deterministic=is_deterministic, biases=stacked, activation=activation
        )

    def __call__(self, x: PlainRows, logits: torch.Tensor) -> torch.Tensor:
        y = torch.empty((len(x), self._down.shape[1]), dtype=x.dtype, device=x.device)
        self._compute(x, logits, y, adds=False)
        return y

    def add_to(self, residual: torch.Tensor, x: PlainRows, logits: torch.Tensor) -> None:
        self._compute(x, logits, residual, adds=True)

    def matrix(self, expert: int, which: int) -> Stack:
        inner = self._gate_up.shape[1] // 2
        return self._down[expert] if which == 2 else self._gate_up[expert, which * inner : (which + 1) * inner]

    def bias(self, expert: int, which: int) -> torch.Tensor:
        assert self._gate_up_bias is not None and self._down_bias is not None
        inner = self._gate_up.shape[1] // 2
        return self._down_bias[expert] if which == 2 else self._gate_up_bias[expert, which * inner :][:inner]

    def rounding(self, num_tokens: int, like: Like) -> None:
        """Inputs are not read in float8."""

    def norms(self, num_tokens: int) -> bool:
        """Whether the norm of so many tokens is best computed along with the experts."""
        return self._are_few(num_tokens)

    def parts(self, x: PlainRows, logits: torch.Tensor) -> Parts | None:
        """The sum by weight, still to be made; None where `add_to` makes it on the way."""
        if self._are_few(len(x)):
            return None
        return self._rows(plain_rows(x), logits)

    def _are_few(self, num_tokens: int) -> bool:
        return num_tokens <= MOST_TOKENS and not self._is_deterministic

    def _compute(self, x: PlainRows, logits: torch.Tensor, y: torch.Tensor, *, adds: bool) -> None:
        routing = self._routing
        if self._are_few(len(x)):
            inner, chosen = few_gated_rows(
                x,
                logits,
                self._gate_up,
                per_token=routing.per_token,
                bias=self._gate_up_bias,
                is_clamped=self._is_clamped,
            )
            few_sums(
                inner,
                logits,
                chosen,
                self._down,
                y,
                renormalises=routing.renormalises,
                adds=adds,
                bias=self._down_bias,
            )
            return
        sum_by_weight(self._rows(plain_rows(x), logits), y, adds=adds)

    def _rows(self, x: torch.Tensor, logits: torch.Tensor) -> Parts:
        """The results of each token's experts, and their weights."""
        routing, gate_up, down = self._routing, self._gate_up, self._down
        if isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor) and self._suits_ordered(x):
            return self._ordered_rows(x, logits, gate_up, down)
        num_experts, num_rows = down.shape[0], len(x) * routing.per_token
        shape = tile_shape(num_rows, num_experts, dtype=x.dtype, is_fixed=self._is_deterministic)
        plan = empty_plan(num_rows, num_slots=num_experts + 1, size=shape.rows, device=x.device)
        experts, weights = route(
            logits, per_token=routing.per_token, renormalises=routing.renormalises, clears=plan
        )
        tiles = plan_tiles(experts.view(-1), num_slots=num_experts + 1, size=shape.rows, found=plan)
        inner = gated_rows(
            x,
            self._gate_up,
            tiles,
            shape,
            per_token=routing.per_token,
            bias=self._gate_up_bias,
            is_clamped=self._is_clamped,
        )
        return Parts(down_rows(inner, self._down, tiles, shape, bias=self._down_bias), weights=weights)

    def _suits_ordered(self, x: torch.Tensor) -> bool:
        if self._is_deterministic or self._is_clamped or self._gate_up_bias is not None:
            return False
        num_experts, width, inner = self._down.shape
        return suits_ordered(len(x) * self._routing.per_token, num_experts, width=width, inner=inner, like=x)

    def _ordered_rows(
        self, x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> Parts:
        """By a library's products."""
        routing, num_experts = self._routing, len(down)
        counts = Counts.empty(len(x), num_experts, per_token=routing.per_token, device=x.device)
        experts, weights = route(
            logits, per_token=routing.per_token, renormalises=routing.renormalises, counts=counts
        )
        ordered = order_rows(x, experts, counts)
        inner = activate_mul(grouped_product(ordered.rows, gate_up, ordered.ends), "silu")
        return Parts(grouped_product(inner, down, ordered.ends), weights=weights, places=ordered.places)


def _format_of(matrix: Stack) -> str:
    return MXFP4 if isinstance(matrix, Mxfp4Matrix) else str(matrix.dtype)


def _empty_stack(like: Stack, *shape: int) -> Stack:
    return like.empty_stack(*shape) if isinstance(like, Mxfp4Matrix) else like.new_empty(shape)
