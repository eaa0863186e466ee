"""A CPU program: the ops of a forward pass, recorded once and then run in one call per step.

A CPU records a model as a GPU captures a graph. The model's code runs once, with arrays that have a shape and no
numbers yet; every layer appends ops. A step then runs the ops on T tokens, of which S rows are selected for logits.
Arrays share the memory of one arena where they do not live at the same time. Their addresses stay the same until a
larger step than all before it makes the arena grow.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.kernel_library import SELECTED, TOKENS, KernelLibrary, Step
from headwater.devices.cpu.kernel_library import Op as NativeOp

_ALIGNMENT = 64  # bytes: a line of the cache, and the widest registers
_ROWS_ALIGNMENT = 16  # kernels may write whole tiles of rows
NO_ROWS = np.zeros(0, dtype=np.int32)
NO_TILES = np.zeros((0, 3), dtype=np.int32)

Numbers = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """An array of a program: [T or S, width], without gaps between the rows."""

    program: "Program"
    rows: int  # TOKENS or SELECTED
    width: int
    dtype: np.dtype

    def columns(self, first: int, width: int) -> "Columns":
        """A part of each row, for an op of several that fill the rows."""
        assert first >= 0 and first + width <= self.width
        return Columns(self, first, width)

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns [first, first + width) of an array."""

    array: Array
    first: int
    width: int


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The ids of a step's tokens, which a program reads from the step."""

    program: "Program"


@dataclass(frozen=True)
class StepArrays:
    """What changes from step to step, as arrays of the host: `Step` of kernels/step.h, whose names these are.

    All arrays are contiguous. Row r computes tokens [query_starts[r], query_starts[r + 1]). Their owner may write the
    numbers of the next step into the same arrays.
    """

    token_ids: npt.NDArray[np.int32]  # [T]
    positions: npt.NDArray[np.int32]  # [T]
    query_starts: npt.NDArray[np.int32]  # [R + 1]
    context_lens: npt.NDArray[np.int32]  # [R]
    page_tables: npt.NDArray[np.int32]  # [R, pages of the longest]
    selected: npt.NDArray[np.int32]  # [S]
    kv: npt.NDArray[np.uint8]  # [pages, page_bytes]
    chunks: npt.NDArray[np.int64]
    queries_per_chunk: int
    partial_slots: npt.NDArray[np.int32]  # [R]
    next_sharing: npt.NDArray[np.int32]  # [R]
    num_decodes: int  # rows [0, num_decodes) have one token each; the others are of prompts
    samples: bool = True  # from the selected tokens; False: their logits are a prompt's
    adapter_rows: npt.NDArray[np.int32] = field(default_factory=lambda: NO_ROWS)  # tokens with an adapter
    adapter_tiles: npt.NDArray[np.int32] = field(default_factory=lambda: NO_TILES)  # [tiles, 3]

    def num_rows_of(self, rows: int) -> int:
        return len(self.token_ids) if rows == TOKENS else len(self.selected)

    @cached_property
    def struct(self) -> Step:
        """The addresses for the kernels. The arrays must outlive their use."""
        arrays = {
            name: getattr(self, name)
            for name in (
                "token_ids", "positions", "query_starts", "context_lens", "page_tables", "selected", "kv", "chunks",
                "partial_slots", "next_sharing", "adapter_rows", "adapter_tiles",
            )
        }  # fmt: skip
        assert all(array.flags.c_contiguous for array in arrays.values())
        return Step(
            num_tokens=len(self.token_ids),
            num_rows=len(self.context_lens),
            num_selected=len(self.selected),
            table_stride=self.page_tables.shape[1],
            num_chunks=len(self.chunks),
            num_adapter_tiles=len(self.adapter_tiles),
            queries_per_chunk=self.queries_per_chunk,
            num_decodes=self.num_decodes,
            num_sampled=len(self.selected) if self.samples else 0,
            **{name: array.ctypes.data for name, array in arrays.items()},
        )


Plain = Callable[..., None]  # (StepArrays, **arrays by their names in the job, cut to the rows of the step)


@dataclass(frozen=True, slots=True)
class Op:
    """A kernel, its job and the program's arrays that the job names; or what computes the same in numpy."""

    kernel: str
    job: ctypes.Structure | None  # None: the op runs without a library alone
    arrays: Mapping[str, Array | Columns]
    plain: Plain | None  # None: it runs with a library alone
    keeps: tuple[object, ...]  # the job holds their addresses

    def whole_arrays(self) -> list[Array]:
        """The arrays that the op reads or writes, or a part of."""
        return list(dict.fromkeys(it if isinstance(it, Array) else it.array for it in self.arrays.values()))


@dataclass(slots=True)
class _Arena:
    """Memory for the arrays of up to so many rows."""

    num_rows: tuple[int, int]  # TOKENS, SELECTED
    memory: npt.NDArray[np.uint8]
    starts: list[int]  # of each slot, in `memory`


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place of the arena, for arrays of one size that do not live at the same time."""

    rows: int
    row_bytes: int


class Program:
    """Ops in the order of their recording. Without a library they run in numpy, many times slower.

    Steps run in one thread. `op_ns` counts the nanoseconds of each op while `is_timed`.
    """

    def __init__(
        self, library: KernelLibrary | None, *, num_threads: int, raise_failure: Callable[[], None] | None = None
    ) -> None:
        """`raise_failure` raises what an op in C could only note."""
        self._library = library
        self._raise_failure = raise_failure
        self._num_threads = num_threads
        self._ops: list[Op] = []
        self._kept: set[Array] = set()
        self._arena: _Arena | None = None
        self._slots: list[_Slot] = []
        self._slot_of: dict[Array, int] = {}
        self._views: dict[Array, Numbers] = {}  # the newest of each array
        self._native_ops: ctypes.Array[NativeOp] | None = None
        self.is_timed = False
        self.op_ns: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(self._ops)

    @property
    def token_ids(self) -> TokenIds:
        return TokenIds(self)

    # --- recording -----------------------------------------------------------------------------------

    def array(self, rows: int, width: int, *, dtype: npt.DTypeLike = np.float32) -> Array:
        """An array for ops to write."""
        return Array(self, rows, width, np.dtype(dtype))

    def keep(self, array: Array) -> Array:
        """Keep an array's numbers to the end of the program, for other code or a later run of a part of the ops."""
        self._kept.add(array)
        return array

    def append(
        self,
        kernel: str,
        job: ctypes.Structure | None,
        arrays: Mapping[str, Array | Columns],
        *,
        plain: Plain | None = None,
        keeps: tuple[object, ...] = (),
    ) -> None:
        """Record an op. `arrays` are the job's fields for which the program has the addresses."""
        assert self._arena is None, "the program has run"
        op = Op(kernel, job, arrays, plain, keeps)
        assert all(array.program is self for array in op.whole_arrays())
        self._ops.append(op)

    def rewrite(self, change: Callable[[Sequence[Op], set[Array]], list[Op]]) -> None:
        """Replace the recorded ops, one by one, by those that `change` makes of them and of the kept arrays."""
        assert self._arena is None, "the program has run"
        ops = change(self._ops, self._kept)
        assert len(ops) == len(self._ops)
        self._ops = ops

    def close(self) -> None:
        """Drop the ops, their weights and the arena.

        Arrays refer to their program. So only the collector would free them, and it leaves out what was loaded at the
        start.
        """
        self._ops.clear()
        self._kept.clear()
        self._slot_of.clear()
        self._arena = self._native_ops = None

    # --- running -------------------------------------------------------------------------------------

    def run(self, step: StepArrays, *, first: int = 0, end: int | None = None) -> None:
        """Run ops [first, end) of a step, to the last op if `end` is not given."""
        end = len(self._ops) if end is None else end
        self._reserve(len(step.token_ids), len(step.selected), first=first)
        if self._library is None:
            for op in self._ops[first:end]:
                assert op.plain is not None
                op.plain(step, **{name: self.view(array, step) for name, array in op.arrays.items()})
            return
        assert self._native_ops is not None
        self._library.functions.hw_run(
            ctypes.addressof(self._native_ops) + first * ctypes.sizeof(NativeOp),
            end - first,
            ctypes.byref(step.struct),
            self._num_threads,
            self.op_ns.ctypes.data + first * self.op_ns.itemsize if self.is_timed else None,
        )
        if self._raise_failure is not None:
            self._raise_failure()

    def view(self, array: Array | Columns, step: StepArrays) -> Numbers:
        """The numbers of an array, [rows of the step, width]; valid until the arena grows."""
        if isinstance(array, Columns):
            return self.view(array.array, step)[:, array.first : array.first + array.width]
        assert self._arena is not None
        num_rows = step.num_rows_of(array.rows)
        newest = self._views.get(array)
        if newest is not None and len(newest) == num_rows:
            return newest
        start = self._arena.starts[self._slot_of[array]]
        memory = self._arena.memory[start : start + num_rows * array.row_bytes]
        view = self._views[array] = memory.view(array.dtype).reshape(num_rows, array.width)
        return view

    # --- memory --------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays by now."""
        return 0 if self._arena is None else self._arena.memory.nbytes

    def _reserve(self, num_tokens: int, num_selected: int, *, first: int) -> None:
        """Have an arena for so many rows. A larger step than all before moves what ops from `first` on may read.

        All else is freed before, so that a step takes no more memory while the arena grows than afterwards.
        """
        if self._arena is None:
            self._slots, self._slot_of = _share_slots(self._ops, self._kept)
            self.op_ns = np.zeros(len(self._ops), dtype=np.int64)
        elif num_tokens <= self._arena.num_rows[TOKENS] and num_selected <= self._arena.num_rows[SELECTED]:
            return
        had = (0, 0) if self._arena is None else self._arena.num_rows
        written = {array for op in self._ops[:first] for array in op.whole_arrays()}
        moved = [] if self._arena is None else [self._copy_of(array) for array in self._kept & written]
        self._views.clear()
        self._arena = None
        self._arena = _allocate(self._slots, (max(num_tokens, had[0]), max(num_selected, had[1])))
        for array, numbers in moved:
            self._memory_of(array)[: len(numbers)] = numbers
        self._bind()

    def _copy_of(self, array: Array) -> tuple[Array, npt.NDArray[np.uint8]]:
        return array, self._memory_of(array).copy()

    def _memory_of(self, array: Array) -> npt.NDArray[np.uint8]:
        assert self._arena is not None
        start = self._arena.starts[self._slot_of[array]]
        return self._arena.memory[start : start + self._arena.num_rows[array.rows] * array.row_bytes]

    def _bind(self) -> None:
        """Write the addresses of the arrays into the jobs."""
        if self._library is None:
            return
        assert self._arena is not None
        base = self._arena.memory.ctypes.data
        native_ops = []
        for op in self._ops:
            assert op.job is not None
            for name, part in op.arrays.items():
                array, first = (part, 0) if isinstance(part, Array) else (part.array, part.first)
                start = self._arena.starts[self._slot_of[array]]
                setattr(op.job, name, base + start + first * array.dtype.itemsize)
            native_ops.append(NativeOp(ctypes.addressof(self._library.kernel(op.kernel)), ctypes.addressof(op.job)))
        self._native_ops = (NativeOp * len(native_ops))(*native_ops)


def _share_slots(ops: list[Op], kept: set[Array]) -> tuple[list[_Slot], dict[Array, int]]:
    """Give each array a slot. Arrays of the same size share one if the first is read for the last time before."""
    last_op = {array: index for index, op in enumerate(ops) for array in op.whole_arrays()}
    slots: list[_Slot] = []
    slot_of: dict[Array, int] = {}
    free: dict[_Slot, list[int]] = {}
    for index, op in enumerate(ops):
        for array in op.whole_arrays():
            if array not in slot_of:
                slot = _Slot(array.rows, array.row_bytes)
                if not free.setdefault(slot, []):
                    free[slot].append(len(slots))
                    slots.append(slot)
                slot_of[array] = free[slot].pop()
        for array in op.whole_arrays():  # only now: no op writes over what it reads
            if last_op[array] == index and array not in kept:
                free[_Slot(array.rows, array.row_bytes)].append(slot_of[array])
    return slots, slot_of


def _allocate(slots: list[_Slot], num_rows: tuple[int, int]) -> _Arena:
    padded = tuple(-(-num // _ROWS_ALIGNMENT) * _ROWS_ALIGNMENT for num in num_rows)
    starts, size = [], 0
    for slot in slots:
        starts.append(size)
        size += -(-padded[slot.rows] * slot.row_bytes // _ALIGNMENT) * _ALIGNMENT
    memory = np.zeros(size + _ALIGNMENT, dtype=np.uint8)
    shift = -memory.ctypes.data % _ALIGNMENT
    return _Arena((padded[TOKENS], padded[SELECTED]), memory, [start + shift for start in starts])
