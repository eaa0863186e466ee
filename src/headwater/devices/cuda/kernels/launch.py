"""Launches a compiled Triton kernel without examining its arguments again.

Triton examines every argument of every launch to find the compiled variant. In Python that takes longer than a small
kernel runs. Callers that know what the variant depends on give that as a key.
"""

from collections.abc import Hashable
from typing import Any

import torch
from triton.compiler import CompiledKernel

_GRID_DIMS = 3
_ALIGNMENT = 16  # Triton compiles for pointers and integers that are multiples of this


class Launcher:
    """Launches one kernel. All its parameters are given in order, constants included."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, CompiledKernel] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        *args: Any,
        key: Hashable,
        num_warps: int = 4,
        num_stages: int = 3,
        maxnreg: int | None = None,
    ) -> None:
        """`key` must differ wherever Triton compiles differently: dtypes, constants, alignment, integers of 1.

        `maxnreg`: registers of a thread, at most.
        """
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, *(1,) * (_GRID_DIMS - len(grid)))](*args)
            return
        compiled = self._kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
        if isinstance(compiled, CompiledKernel):  # the interpreter returns none
            self._compiled[key] = compiled


def alignment(*values: torch.Tensor | int) -> tuple[bool, ...]:
    """What Triton sees of pointers and of integers other than 1, for a key."""
    return tuple((value if isinstance(value, int) else value.data_ptr()) % _ALIGNMENT == 0 for value in values)
