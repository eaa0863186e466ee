"""Jobs of the CPU kernels around attention, field by field as in kernels/*.h, and a step's list of attention work.

hw_prepare_qkv and hw_attention share one job. Shape letters as in devices/device.py.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_HEAD_DIM = 256
MAX_STACKED = 96  # query heads times queries that a chunk of any library holds, and heads of rows that share a block
BLOCK_KEYS = 256  # blocks of keys begin at multiples of it, so that results do not depend on chunks
MAX_PARTIALS = 512  # queries times blocks of keys that the split rows of a step may have in all
_MAX_ROWS = 1 << 16
_IS_SHARED = -(1 << 63)
_CHUNKS_PER_THREAD = 4  # enough for threads to end together
_COMMON_STEP = 32  # keys that kernels compute at once: a block is shared up to a multiple
_LEAST_COMMON = BLOCK_KEYS // 2  # keys of a block, behind which each row has its own

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

KV_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")  # by their number in attention.h


class AttentionJob(ctypes.Structure):
    """`AttentionJob` of kernels/attention.h, which prepare_qkv and attention share."""

    _fields_ = (
        ("num_heads", _INT64),
        ("num_kv_heads", _INT64),
        ("head_dim", _INT64),
        ("kv_dtype", _INT64),
        ("page_size", _INT64),
        ("page_bytes", _INT64),
        ("layer_offset", _INT64),
        ("norm_eps", _FLOAT),
        ("scale", _FLOAT),
        ("qkv", _POINTER),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("norms_whole", _INT64),
        ("squares", _POINTER),
        ("num_normed", _INT64 * 2),
        ("pair_order", _POINTER),
        ("window", _INT64),
        ("sinks", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("out", _POINTER),
        ("partial_sums", _POINTER),
        ("partial_stats", _POINTER),
        ("num_done", _POINTER),
    )


class RmsNormJob(ctypes.Structure):
    """`RmsNormJob` of kernels/norm.c: y = x / rms(x) * weight, all float32[rows, size]; add_rms_norm adds it to y."""

    _fields_ = (
        ("x", _POINTER), ("weight", _POINTER), ("y", _POINTER), ("size", _INT64), ("eps", _FLOAT), ("rows", _INT64),
        ("activations", _POINTER), ("activation_format", _INT64),  # fuse_activations of packed_layers.py
    )  # fmt: skip


class SquareSumsJob(ctypes.Structure):
    """`SquareSumsJob` of kernels/rotary.c: squares of queries and of keys, float32[T, stride] -> float32[T, 2]."""

    _fields_ = (
        ("qkv", _POINTER), ("squares", _POINTER), ("stride", _INT64), ("first_key", _INT64),
        ("num_counted", _INT64 * 2),
    )  # fmt: skip


class RotaryAnglesJob(ctypes.Structure):
    """`RotaryAnglesJob` of kernels/rotary.c: factor times cos and sin of positions times inv_freq, float32[T, half]."""

    _fields_ = (("inv_freq", _POINTER), ("cos", _POINTER), ("sin", _POINTER), ("half", _INT64), ("factor", _FLOAT))


class SelectRowsJob(ctypes.Structure):
    """`SelectRowsJob` of kernels/rows.c: the selected rows of x, float32[T, size] -> float32[S, size]."""

    _fields_ = (("x", _POINTER), ("y", _POINTER), ("size", _INT64))


class ArgmaxJob(ctypes.Structure):
    """`ArgmaxJob` of kernels/draw.c: the first of the largest logits of each row, and whether all are finite."""

    _fields_ = (
        ("logits", _POINTER),  # float32[rows, cols]
        ("tokens", _POINTER),  # int32[rows]
        ("is_finite", _POINTER),  # uint8[rows]
        ("values", _POINTER),  # float32[rows], or None
        ("cols", _INT64),
        ("num_rows", _INT64),  # -1: the step's selected rows
    )


class DrawJob(ctypes.Structure):
    """`DrawJob` of kernels/draw.c: one token for each of some rows, drawn from softmax(logits / temperature)."""

    _fields_ = (
        ("logits", _POINTER),  # float32[any, cols]
        ("rows", _POINTER),  # int32[num_rows] rows of logits
        ("keys", _POINTER),  # uint64[num_rows], noise_keys of devices/noise.py
        ("temperatures", _POINTER),  # float32[num_rows]
        ("log_min_p", _POINTER),  # float32[num_rows], -inf: none
        ("tokens", _POINTER),  # int32[num_rows]; -1 for a row whose cut falls among too many tokens
        ("cols", _INT64),
        ("num_rows", _INT64),
        ("top_k", _POINTER),  # int32[num_rows] or null, 0: all
        ("top_p", _POINTER),  # float32[num_rows] or null, 1: all
        ("masks", _POINTER),  # uint32[any, num_words] or null: all tokens are allowed
        ("mask_rows", _POINTER),  # int32[num_rows] rows of masks, -1: all tokens are allowed
        ("num_words", _INT64),
    )


class MaskedArgmaxJob(ctypes.Structure):
    """`MaskedArgmaxJob` of kernels/draw.c: the first of the largest allowed logits of some rows."""

    _fields_ = (
        ("logits", _POINTER),  # float32[any, cols]
        ("rows", _POINTER),  # int32[num_rows] rows of logits
        ("masks", _POINTER),  # uint32[any, num_words]
        ("mask_rows", _POINTER),  # int32[num_rows] rows of masks
        ("tokens", _POINTER),  # int32[num_rows]
        ("cols", _INT64),
        ("num_rows", _INT64),
        ("num_words", _INT64),
    )


@dataclass(frozen=True, slots=True)
class WorkList:
    """What `Step` says of a step's attention."""

    # (block + 1 of a split row) << 48 | row << 32 | first query, longest first. A shared block has the sign, and the
    # number of keys that are common (0: all) instead of the first query.
    chunks: npt.NDArray[np.int64]
    queries_per_chunk: int
    partial_slots: npt.NDArray[np.int32]  # [R]
    next_sharing: npt.NDArray[np.int32]  # [R]


def check_geometry(*, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """ValueError if the attention kernel cannot compute this shape."""
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention on a CPU needs a head_dim that is a multiple of 8 up to 256, found {head_dim}")
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_STACKED:
        raise ValueError(
            f"attention on a CPU needs at most {MAX_STACKED} query heads for each KV head, "
            f"found {num_heads} for {num_kv_heads}"
        )


def partial_arrays(*, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a job that keep the partial results of split rows. All layers may share them."""
    return {
        "partial_sums": np.zeros((MAX_PARTIALS, num_heads, head_dim), dtype=np.float32),
        "partial_stats": np.zeros((MAX_PARTIALS, num_heads, 2), dtype=np.float32),
        "num_done": np.zeros((MAX_PARTIALS, num_kv_heads), dtype=np.int32),
    }


def work_list(
    query_starts: npt.NDArray[np.int32],
    context_lens: npt.NDArray[np.int32],
    *,
    num_heads: int,
    num_kv_heads: int,
    num_threads: int,
    page_tables: npt.NDArray[np.int32] | None = None,
    page_size: int = 1,
    num_decodes: int = 0,
    max_stacked: int = MAX_STACKED,
) -> WorkList:
    """Cut a step's attention into chunks. Results do not depend on the cut, so it may depend on anything.

    With page tables, blocks that the first `num_decodes` rows share are computed once for all of them. `max_stacked` is
    the library's.
    """
    assert len(context_lens) <= _MAX_ROWS
    query_lens = np.diff(query_starts).astype(np.int64)
    contexts = context_lens.astype(np.int64)
    per_kv = num_heads // num_kv_heads
    most_queries = max_stacked // per_kv
    wanted = -(-_CHUNKS_PER_THREAD * num_threads // num_kv_heads)
    least_queries = -(-MAX_STACKED // per_kv // 3)  # with fewer, tiles are too small
    per_chunk = _queries_per_chunk(query_lens, least_queries, most_queries, wanted=wanted)
    groups: list[_Sharing] = []
    if page_tables is not None:
        groups = _sharing_rows(contexts[:num_decodes], page_tables, page_size=page_size, most=MAX_STACKED // per_kv)
    num_chunks = -(-query_lens // per_chunk)
    rows = np.repeat(np.arange(len(num_chunks)), num_chunks)
    firsts = (np.arange(len(rows)) - np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)) * per_chunk
    queries = np.minimum(per_chunk, query_lens[rows] - firsts)
    num_keys = contexts[rows] - query_lens[rows] + firsts + queries
    work = num_keys * queries
    limit = int(work.sum()) / wanted if num_threads > 1 else math.inf
    partial_slots, groups = _split_rows(query_lens, contexts, limit=limit, groups=groups)
    num_shared, next_sharing = np.zeros((2, len(contexts)), dtype=np.int32)
    next_sharing[:] = -1
    for group in groups:
        num_shared[group.rows] = group.num_blocks
        next_sharing[group.rows[:-1]] = group.rows[1:]
    num_blocks = np.where(partial_slots[rows] >= 0, -(-num_keys // BLOCK_KEYS), 1)
    entries = np.repeat(np.arange(len(rows)), num_blocks)
    blocks = np.arange(len(entries)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks) + 1
    blocks[partial_slots[rows[entries]] < 0] = 0
    is_own = (blocks == 0) | (blocks > num_shared[rows[entries]])
    entries, blocks = entries[is_own], blocks[is_own]
    work = np.where(blocks > 0, np.minimum(work[entries], BLOCK_KEYS * queries[entries]), work[entries])
    chunks = (blocks << 48) | (rows[entries] << 32) | firsts[entries]
    for group in groups:
        shared = np.arange(1, group.num_blocks + 1, dtype=np.int64) << 48
        shared[-1] |= group.num_common
        chunks = np.concatenate((chunks, shared | (int(group.rows[0]) << 32) | _IS_SHARED))
        work = np.concatenate((work, np.full(group.num_blocks, BLOCK_KEYS * len(group.rows))))
    return WorkList(chunks[np.argsort(-work, kind="stable")], per_chunk, partial_slots, next_sharing)


@dataclass(frozen=True, slots=True)
class _Sharing:
    """Rows of one query whose first blocks of keys lie on the same pages."""

    rows: npt.NDArray[np.int64]
    num_blocks: int
    num_common: int  # keys of the last block, 0: all


def _sharing_rows(
    contexts: npt.NDArray[np.int64],
    page_tables: npt.NDArray[np.int32],
    *,
    page_size: int,
    most: int,
) -> list[_Sharing]:
    """Groups of at most `most` rows that share at least one whole block."""
    by_first_pages: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(contexts > BLOCK_KEYS).tolist():
        by_first_pages.setdefault(page_tables[row, : -(-BLOCK_KEYS // page_size)].tobytes(), []).append(row)
    groups = []
    for rows in by_first_pages.values():
        for begin in range(0, len(rows), most):
            members = np.array(rows[begin : begin + most])
            tables = page_tables[members, : int(contexts[members].min()) // page_size]
            is_common = (tables == tables[0]).all(axis=0)
            num_common = len(is_common) if is_common.all() else int(is_common.argmin())
            num_blocks, num_keys = divmod(num_common * page_size, BLOCK_KEYS)
            num_keys = num_keys // _COMMON_STEP * _COMMON_STEP if num_keys >= _LEAST_COMMON else 0
            if len(members) > 1 and num_blocks:
                groups.append(_Sharing(members, num_blocks + (num_keys > 0), num_keys))
    return groups


def _queries_per_chunk(query_lens: npt.NDArray[np.int64], least: int, most: int, *, wanted: int) -> int:
    """As many as fit, but fewer if there would not be `wanted` chunks."""
    total = int(query_lens.sum())
    return int(min(most, max(least, -(-total // wanted))))


def _split_rows(
    query_lens: npt.NDArray[np.int64], contexts: npt.NDArray[np.int64], *, limit: float, groups: list[_Sharing]
) -> tuple[npt.NDArray[np.int32], list[_Sharing]]:
    """The first slot of each row that shares blocks or has more work than `limit`, else -1; groups with slots."""
    slots = np.full(len(contexts), -1, dtype=np.int32)
    num_slots = query_lens * -(-contexts // BLOCK_KEYS)
    used, kept = 0, []
    for group in groups:
        needed = num_slots[group.rows]
        if used + int(needed.sum()) <= MAX_PARTIALS:
            slots[group.rows] = used + np.cumsum(needed) - needed
            used += int(needed.sum())
            kept.append(group)
    for row in np.argsort(-contexts, kind="stable"):
        if slots[row] >= 0 or contexts[row] <= BLOCK_KEYS or used + num_slots[row] > MAX_PARTIALS:
            continue
        if contexts[row] * query_lens[row] > limit:
            slots[row], used = used, used + int(num_slots[row])
    return slots, kept
