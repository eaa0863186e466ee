"""Steps of attention for tests: random sequences on scattered pages, computed by the kernels or in numpy."""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu import attention_kernels
from headwater.devices.cpu.attention_kernels import AttentionJob, RotaryAnglesJob, WorkList, partial_arrays, work_list
from headwater.devices.cpu.kernel_library import KernelLibrary, Step
from headwater.devices.cpu.plain.attention import StepRows, attend, prepare_qkv
from headwater.devices.cpu.plain.kv_pages import LayerPages
from headwater.devices.cpu.plain.norm import rotary_angles
from headwater.devices.device import RotaryAngles
from headwater.devices.number_formats import STORAGE_TYPES

Floats = npt.NDArray[np.float32]
Span = tuple[int, int, int]  # a step computes tokens [begin, end) of a sequence
NORM_EPS, ROPE_FACTOR = 1e-6, 1.25


@dataclass
class Sequences:
    """Some sequences and the pages of a memory of three layers. Whatever is not written is NaN in every format."""

    lengths: Sequence[int]
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    has_qk_norm: bool = False
    window: int = 0  # 0: none
    has_sinks: bool = False
    seed: int = 0
    layer: int = 1
    qkv: list[Floats] = field(init=False)
    page_tables: npt.NDArray[np.int32] = field(init=False)
    memory: npt.NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = [random.normal(size=(length, width)).astype(np.float32) for length in self.lengths]
        pages = -(-max(self.lengths) // self.page_size)
        ids = random.permutation(pages * len(self.lengths) + 1)[1:]
        self.page_tables = ids.reshape(len(self.lengths), pages).astype(np.int32)
        self.memory = self.empty_memory()
        self.norms = random.normal(1, 0.2, size=(2, self.head_dim)).astype(np.float32) if self.has_qk_norm else None
        self.sinks = random.normal(0, 2, size=self.num_heads).astype(np.float32) if self.has_sinks else None
        self.inv_freq = (1 / 10000 ** (np.arange(0, self.head_dim, 2) / self.head_dim)).astype(np.float32)

    @property
    def layer_bytes(self) -> int:
        heads = 2 * self.num_kv_heads * self.page_size
        num_bytes = heads * self.head_dim * STORAGE_TYPES[self.dtype].itemsize
        return num_bytes + (heads + -(num_bytes + heads) % 16 if self.dtype.startswith("float8") else 0)

    def empty_memory(self) -> npt.NDArray[np.uint8]:
        return np.full((self.page_tables.size + 1, 3 * self.layer_bytes), 0xFF, dtype=np.uint8)

    def pages(self, memory: npt.NDArray[np.uint8]) -> LayerPages:
        offset = self.layer * self.layer_bytes
        return LayerPages(memory, offset, self.num_kv_heads, self.page_size, self.head_dim, self.dtype)

    def rows(self, spans: Sequence[Span]) -> StepRows:
        ends = np.cumsum([end - begin for _, begin, end in spans])
        return StepRows(
            query_starts=np.concatenate(([0], ends)).astype(np.int32),
            context_lens=np.array([end for _, _, end in spans], dtype=np.int32),
            page_tables=self.page_tables[[sequence for sequence, _, _ in spans]],
            positions=np.concatenate([np.arange(begin, end) for _, begin, end in spans]).astype(np.int32),
        )

    def inputs(self, spans: Sequence[Span]) -> Floats:
        return np.concatenate([self.qkv[sequence][begin:end] for sequence, begin, end in spans])


@dataclass
class PlainStep:
    """A step in numpy. `memory` is written."""

    sequences: Sequences
    memory: npt.NDArray[np.uint8]

    def prepare(self, spans: Sequence[Span]) -> Floats:
        sequences, rows = self.sequences, self.sequences.rows(spans)
        cos, sin = rotary_angles(rows.positions, RotaryAngles(sequences.inv_freq, ROPE_FACTOR))
        qkv = sequences.inputs(spans)
        norms = sequences.norms
        prepare_qkv(
            qkv, rows, sequences.pages(self.memory), cos=cos, sin=sin,
            q_norm=None if norms is None else norms[0], k_norm=None if norms is None else norms[1], norm_eps=NORM_EPS,
        )  # fmt: skip
        return qkv

    def attend(self, qkv: Floats, spans: Sequence[Span]) -> Floats:
        sequences = self.sequences
        scale = sequences.head_dim**-0.5
        pages, window = sequences.pages(self.memory), sequences.window or None
        return attend(qkv, sequences.rows(spans), pages, scale=scale, window=window, sinks=sequences.sinks)


class NativeStep:
    """A step by the kernels, chunks in a random order, on several threads if `num_threads` is more than one."""

    def __init__(self, library: KernelLibrary, sequences: Sequences, *, num_threads: int = 1, seed: int = 0) -> None:
        self.library = library
        self._sequences = sequences
        self._num_threads = num_threads
        self._random = np.random.default_rng(seed)
        shape = {
            "num_heads": sequences.num_heads, "num_kv_heads": sequences.num_kv_heads, "head_dim": sequences.head_dim,
        }  # fmt: skip
        self.partials = partial_arrays(**shape)
        self._shape = shape

    def run(
        self, spans: Sequence[Span], *, num_workers: int = 2, shares_blocks: bool = False, num_decodes: int = 0
    ) -> tuple[Floats, Floats]:
        """The prepared qkv and the attention's output. `num_workers`: the work is cut for that many threads.

        With AMX, the rows behind the first `num_decodes` are computed in tiles.
        """
        sequences, rows = self._sequences, self._sequences.rows(spans)
        qkv = sequences.inputs(spans)
        out = np.full((len(qkv), sequences.num_heads * sequences.head_dim), np.nan, dtype=np.float32)
        angles = np.empty((2, len(qkv), sequences.head_dim // 2), dtype=np.float32)
        work = work_list(
            rows.query_starts, rows.context_lens, num_heads=sequences.num_heads, num_kv_heads=sequences.num_kv_heads,
            num_threads=num_workers, page_tables=rows.page_tables if shares_blocks else None,
            page_size=sequences.page_size, num_decodes=num_decodes,
            max_stacked=self.library.max_stacked,
        )  # fmt: skip
        step = step_of(rows, sequences.memory, work, num_decodes=num_decodes)
        self.last_work = work
        self._run("rotary_angles", self._rotary_job(angles), step)
        job = self._job(qkv, out, angles)
        self._run("prepare_qkv", job, step)
        self._run("attention", job, step)
        return qkv, out

    def _rotary_job(self, angles: Floats) -> RotaryAnglesJob:
        inv_freq = self._sequences.inv_freq
        return RotaryAnglesJob(
            inv_freq=inv_freq.ctypes.data, cos=angles[0].ctypes.data, sin=angles[1].ctypes.data,
            half=len(inv_freq), factor=ROPE_FACTOR,
        )  # fmt: skip

    def _job(self, qkv: Floats, out: Floats, angles: Floats) -> AttentionJob:
        sequences = self._sequences
        norms = sequences.norms
        return AttentionJob(
            **self._shape,
            kv_dtype=attention_kernels.KV_DTYPES.index(sequences.dtype),
            page_size=sequences.page_size,
            page_bytes=sequences.memory.shape[1],
            layer_offset=sequences.layer * sequences.layer_bytes,
            norm_eps=NORM_EPS,
            window=sequences.window,
            sinks=None if sequences.sinks is None else sequences.sinks.ctypes.data,
            scale=sequences.head_dim**-0.5,
            qkv=qkv.ctypes.data,
            q_norm=None if norms is None else norms[0].ctypes.data,
            k_norm=None if norms is None else norms[1].ctypes.data,
            cos=angles[0].ctypes.data,
            sin=angles[1].ctypes.data,
            out=out.ctypes.data,
            **{name: array.ctypes.data for name, array in self.partials.items()},
        )

    def _run(self, name: str, job: ctypes.Structure, step: Step) -> None:
        kernel, address = self.library.kernel(name), ctypes.addressof(job)
        chunks = self._random.permutation(kernel.num_chunks(address, ctypes.byref(step))).tolist()
        if self._num_threads == 1:
            for chunk in chunks:
                kernel.run_chunk(address, ctypes.byref(step), chunk)
            return
        with ThreadPoolExecutor(self._num_threads) as threads:
            list(threads.map(lambda chunk: kernel.run_chunk(address, ctypes.byref(step), chunk), chunks))


def step_of(rows: StepRows, memory: npt.NDArray[np.uint8], work: WorkList, *, num_decodes: int = 0) -> Step:
    """The C struct. It holds addresses: the arrays must outlive it."""
    arrays: dict[str, Any] = {
        "positions": rows.positions, "query_starts": rows.query_starts, "context_lens": rows.context_lens,
        "page_tables": rows.page_tables, "kv": memory, "chunks": work.chunks, "partial_slots": work.partial_slots,
        "next_sharing": work.next_sharing,
    }  # fmt: skip
    assert all(array.flags.c_contiguous for array in arrays.values())
    return Step(
        num_tokens=len(rows.positions), num_rows=len(rows.context_lens), table_stride=rows.page_tables.shape[1],
        num_chunks=len(work.chunks), queries_per_chunk=work.queries_per_chunk, num_decodes=num_decodes,
        **{name: array.ctypes.data for name, array in arrays.items()},
    )  # fmt: skip
