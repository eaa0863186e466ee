"""Paged causal attention in numpy, row by row: the definition that kernels/attention.c computes.

Shape letters as in devices/device.py.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.plain.kv_pages import KEY, VALUE, LayerPages
from headwater.devices.cpu.plain.norm import Floats, rms_norm, rotate


@dataclass(frozen=True, slots=True)
class StepRows:
    """Which tokens a step computes and where their sequences lie; the fields of devices.device.AttentionBatch."""

    query_starts: npt.NDArray[np.int32]  # [R + 1]
    context_lens: npt.NDArray[np.int32]  # [R], the tokens of this step included
    page_tables: npt.NDArray[np.int32]  # [R, pages]
    positions: npt.NDArray[np.int32]  # [T]


def prepare_qkv(
    qkv: Floats,
    rows: StepRows,
    pages: LayerPages,
    *,
    cos: Floats,
    sin: Floats,
    q_norm: Floats | None,
    k_norm: Floats | None,
    norm_eps: float,
    norms_whole: bool = False,
    squares: Floats | None = None,
    num_normed: tuple[int, int] | None = None,
    pair_order: npt.NDArray[np.int32] | None = None,
) -> None:
    """Norm and rotate queries and keys in place, and write keys and values to their pages. `qkv` is [T, (H + 2G) D].

    `norms_whole`: the norms are of all heads together; where these are a part, `squares` [T, 2] are the sums over all
    ranks, of `num_normed` numbers of queries and of keys. `pair_order`: see AttentionGeometry.
    """
    num_tokens = len(qkv)
    heads = qkv.reshape(num_tokens, -1, pages.head_dim)  # a view
    num_heads = heads.shape[1] - 2 * pages.num_kv_heads
    q, k = heads[:, :num_heads], heads[:, num_heads : -pages.num_kv_heads]
    for which, (x, weight) in enumerate(((q, q_norm), (k, k_norm))):
        if weight is not None and norms_whole:
            flat = x.reshape(num_tokens, -1)
            total = None if squares is None or num_normed is None else squares[:, which : which + 1] / num_normed[which]
            x[:] = rms_norm(flat, weight, norm_eps, mean_square=total).reshape(x.shape)
        elif weight is not None:
            x[:] = rms_norm(x, weight, norm_eps)
        x[:] = rotate(x if pair_order is None else x[..., pair_order], cos, sin)
    row_of_token = np.repeat(np.arange(len(rows.context_lens)), np.diff(rows.query_starts))
    page_ids = rows.page_tables[row_of_token, rows.positions // pages.page_size]
    offsets = rows.positions % pages.page_size
    pages.write(KEY, k, page_ids, offsets)
    pages.write(VALUE, heads[:, -pages.num_kv_heads :], page_ids, offsets)


def attend(
    qkv: Floats,
    rows: StepRows,
    pages: LayerPages,
    *,
    scale: float,
    window: int | None = None,
    sinks: Floats | None = None,
) -> Floats:
    """Attention of prepared queries over the pages: [T, (H + 2G) D] -> [T, H D].

    `window`: how many keys a query sees, its own included; None: all before it. `sinks` [H]: a score more in each
    softmax, without a value (arXiv 2309.17453, as gpt-oss learns it).
    """
    num_kv_heads, head_dim = pages.num_kv_heads, pages.head_dim
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = qkv[:, : num_heads * head_dim].reshape(len(qkv), num_kv_heads, -1, head_dim)  # [T, G, H / G, D]
    out = np.empty_like(q)
    for row, context in enumerate(rows.context_lens.tolist()):
        tokens = slice(rows.query_starts[row], rows.query_starts[row + 1])
        keys, values = (pages.read(which, rows.page_tables[row], context) for which in (KEY, VALUE))
        scores = np.einsum("tghd,gkd->gthk", q[tokens], keys) * np.float32(scale)
        distance = rows.positions[tokens, None] - np.arange(context)  # [queries, keys]
        is_hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores[:, is_hidden[:, None].repeat(q.shape[2], axis=1)] = -np.inf
        largest = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            sink = sinks.reshape(num_kv_heads, 1, -1, 1)
            largest = np.maximum(largest, sink)
        weights = np.exp(scores - largest)
        sums = np.einsum("gthk,gkd->tghd", weights, values)
        total = weights.sum(axis=-1)
        if sinks is not None:
            total += np.exp(sink - largest)[..., 0]
        out[tokens] = sums / total.transpose(1, 0, 2)[..., None]
    return out.reshape(len(qkv), -1)
