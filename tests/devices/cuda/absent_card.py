"""Compiles the Triton kernels for a card that is not there; run by kernels_compile.py in a process of its own.

Their callers run as they are, on tensors in ordinary memory; in place of a launch stands the compilation for a Hopper
card. Prints a line of JSON: group -> kernel -> shared memory in bytes, or what went wrong.
"""

import json
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from attention_setting import Setting
from headwater.devices.adapters import AdapterShape
from headwater.devices.cuda.adapters import CudaAdapters
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels.coded.tiles import tiles
from headwater.devices.cuda.kernels.experts.grouped import sum_by_weight
from headwater.devices.cuda.kernels.experts.ordered import order_rows
from headwater.devices.cuda.kernels.experts.route import Counts, route
from headwater.devices.cuda.kernels.few_rows.stream import stream
from headwater.devices.cuda.kernels.fixed import fixed_logsumexp
from headwater.devices.cuda.kernels.greedy import GreedyScratch, choose_allowed, choose_greedy
from headwater.devices.cuda.kernels.head_copy import copy_heads
from headwater.devices.cuda.kernels.layers import norm_columns, square_sums
from headwater.devices.cuda.kernels.one_shot import OneShotBuffers, one_shot_all_reduce
from headwater.devices.cuda.kernels.page_copy import copy_pages
from headwater.devices.cuda.kernels.rounded import activate_round, add_and_norm, round_tokens
from headwater.devices.cuda.kernels.rows import Parts
from headwater.devices.cuda.kernels.sampling import draw_part, draw_tokens
from headwater.devices.cuda.kernels.scatter import write_entries
from headwater.devices.cuda.paged_batch import ExternalChunks
from headwater.devices.cuda.products.coded_matrix import place_codes
from headwater.devices.cuda.products.gated_linear import CudaGatedLinear
from headwater.devices.cuda.products.linear import CudaLinear
from headwater.devices.device import AttentionGeometry, LayerAttention, Routing
from headwater.devices.host_tensor import HostTensor
from headwater.devices.scaled_tensor import ScaledTensor

# the kinds of rows that have kernels of their own: decodes, whole chunks and chunks in pieces
ROWS = [(1, 300), (20, 900)]


class AbsentCard:
    """As much of a Triton driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


class AbsentAttention:
    """A backend for the external chunks."""

    name = "absent"

    def refusal(self, geometry: AttentionGeometry, dtype: torch.dtype) -> str | None:
        return None

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        chunks: ExternalChunks,
        *,
        scale: float,
    ) -> None:
        assert len(k) == len(v) == 900


def attention(dtype: torch.dtype, kv_dtype: str | None, geometry: tuple[int, int, int]) -> None:
    device = CudaDevice(torch.device("cpu"))
    layers = (LayerAttention(), LayerAttention(window=128))
    Setting(ROWS, dtype=dtype, kv_dtype=kv_dtype, geometry=geometry, layers=layers, has_sinks=True).run(device, layer=1)
    setting = Setting(ROWS, dtype=dtype, kv_dtype=kv_dtype, geometry=geometry, has_norm=True)
    lens, contexts = np.diff(setting.query_starts)[1:], setting.context_lens[1:]
    assert len(device.plan_tiles(setting.geometry, lens, contexts).joins)
    setting.run(device, layer=1)
    device.external_attention, device.min_external_tokens = AbsentAttention(), 1
    setting.run(device, layer=1)


def layers() -> None:
    """Norm, gate, and products of one token and of four, with and without a bias."""
    device = CudaDevice(torch.device("cpu"))
    device.rms_norm(torch.zeros(3, 512), torch.ones(512, dtype=torch.bfloat16), 1e-6)
    weight, bias = torch.zeros(1024, 512, dtype=torch.bfloat16), torch.zeros(1024, dtype=torch.bfloat16)
    queries = torch.zeros(3, 512, dtype=torch.bfloat16)
    squares = square_sums(queries, (0, 256), (256, 0))
    norm_columns(queries, weight[0], 1e-6, squares=squares[:, 0], num_normed=1024)
    for num_tokens in (1, 4, 9):
        x = torch.zeros(num_tokens, 512, dtype=torch.bfloat16)
        device.pack_linear([weight], [bias])(x)
        device.pack_linear([weight]).add_to(torch.zeros(num_tokens, 1024), x)
        device.pack_gated_linear(weight, weight)(x)
        linear = device.pack_linear([weight])
        linear(device.rms_norm(torch.zeros(num_tokens, 512), weight[0], 1e-6, reader=linear))
    kinds = ((torch.uint8, 4096, False), (torch.bfloat16, 4096, True), (torch.bfloat16, 14336, False))
    for dtype, width, is_gated in kinds:
        weight, scales = torch.zeros((64, width), dtype=dtype), torch.zeros(64) if dtype == torch.uint8 else None
        y = torch.zeros(1, 32 if is_gated else 64)
        stream(torch.zeros(1, width), weight, scales, None, y, adds=not is_gated, is_gated=is_gated)


def deterministic() -> None:
    """The kernels of --deterministic: products, the attention that masks all blocks, the sum of a row's logits."""
    device = CudaDevice(torch.device("cpu"), is_deterministic=True)
    setting = Setting([(20, 900)], dtype=torch.bfloat16, kv_dtype=None, geometry=(8, 2, 128), has_norm=True)
    setting.run(device, layer=1)
    for dtype in (torch.bfloat16, torch.float32):
        weight, bias = torch.zeros(1024, 512, dtype=dtype), torch.zeros(1024, dtype=dtype)
        for num_tokens in (1, 70):
            x = torch.zeros(num_tokens, 512, dtype=dtype)
            device.pack_linear([weight], [bias])(x)
            device.pack_linear([weight]).add_to(torch.zeros(num_tokens, 1024), x)
            device.pack_linear([weight]).logits(x)
            device.pack_gated_linear(weight, weight)(x)
    fixed_logsumexp(torch.zeros(2, 9000))


def coded() -> None:
    """Weights of 4 and 8 bits: one token, some and many; rows of an embedding, rounded activations."""
    device = CudaDevice(torch.device("cpu"))
    kinds: list[tuple[Any, tuple[int, int], float]] = [
        ("int4", (1, 128), -8), ("int4", (1, 128), 1), ("int4", (1, 32), 0), ("int4", (1, 512), 0),
        ("int8", (1, 16), 0), ("int8", (1, 512), 0), ("int8", (1, 32), 1), ("float8_e4m3fn", (1, 512), 0),
        ("float8_e4m3fn", (128, 128), 0),
    ]  # fmt: skip
    for form, tile, offset in kinds:  # codes of 4 bits with offsets of -8 have zero points
        numbers = np.ones((-(-256 // tile[0]), -(-512 // tile[1])), np.float32)
        codes = np.zeros((256, 256 if form == "int4" else 512), np.int8 if form == "int8" else np.uint8)
        tensor = ScaledTensor(form, (256, 512), codes, numbers, tile=tile, offsets=offset * numbers if offset else None)
        matrix = device.place(tensor, form=form)
        bias = torch.zeros(256, dtype=torch.bfloat16)
        device.pack_linear([matrix], [bias])(torch.zeros(1, 512, dtype=torch.bfloat16))
        for num_tokens in (1, 4, 100, 200, 1000):
            x = torch.zeros(num_tokens, 512, dtype=torch.bfloat16)
            device.pack_linear([matrix]).add_to(torch.zeros(num_tokens, 256), x)
        device.pack_linear([matrix]).embed(torch.zeros(3, dtype=torch.int32))
        gated = device.pack_gated_linear(matrix, matrix)
        gated(device.rms_norm(torch.zeros(1, 512), torch.zeros(512, dtype=torch.bfloat16), 1e-6, reader=gated))
    for group in (512, 128):
        rounded = round_tokens(torch.zeros(3, 512, dtype=torch.bfloat16), group)
        codes, scales = rounded.codes, rounded.scales
        gates = torch.zeros(3, 1024, dtype=torch.bfloat16)
        activate_round(gates, "silu", group=group)
        activate_round(gates.repeat(1, 6), "silu", group=3072 if group == 512 else group)
        for parts in (None, Parts(gates.view(2, 3, 512)), Parts(torch.zeros(4, 3, 512), bias=gates[0, :512])):
            add_and_norm(parts, torch.zeros(3, 512), gates[0, :512], 1e-6, group=group)
        numbers = np.ones((2, 512 // group), np.float32)
        tensor = ScaledTensor("float8_e4m3fn", (256, 512), np.zeros((256, 512), np.uint8), numbers, tile=(128, group))
        matrix = place_codes(tensor, torch.device("cpu"))
        for num_tokens in (3, 60, 130):
            x, x_scales = codes[:1].repeat(num_tokens, 1), scales[:1].repeat(num_tokens, 1)
            tiles(x, matrix, None, torch.zeros(num_tokens, 256), adds=True, token_scales=x_scales)


def adapters() -> None:
    """Few rows and many, in both dtypes of activations."""
    sites = {"qkv": (1024, (512, 128, 128)), "o": (512, (1024,)), "gate_up": (1024, (700, 700)), "down": (700, (1024,))}
    shape = AdapterShape(num_layers=1, num_slots=3, max_rank=64, sites=sites)
    for form, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        memory = CudaAdapters(shape, form=form, device=torch.device("cpu"))
        linear = CudaGatedLinear(CudaLinear([torch.zeros(700, 1024, dtype=dtype)] * 2))
        for num_rows in (1, 40, 300):
            step = memory.of_step(torch.zeros(num_rows, dtype=torch.int32))
            x = torch.zeros(num_rows, 1024, dtype=dtype)
            step.add("qkv", 0, x, torch.zeros(num_rows, 768, dtype=dtype))
            step.add("down", 0, step.gated(0, linear, x), torch.zeros(num_rows, 1024))


def experts() -> None:
    """Few tokens, and every shape of tiles."""
    for dtype in (torch.bfloat16, torch.float32):
        gate, down = torch.zeros(768, 512, dtype=dtype), torch.zeros(512, 768, dtype=dtype)
        for is_deterministic in (False, True):
            device = CudaDevice(torch.device("cpu"), is_deterministic=is_deterministic)
            routing = Routing(2, is_deterministic)
            layer = device.pack_experts([(gate, gate, down)] * 8, num_experts=8, routing=routing)
            for num_tokens in (1, 20, 100, 300, 500):
                x, logits = torch.zeros(num_tokens, 512, dtype=dtype), torch.zeros(num_tokens, 8)
                layer(x, logits)
                layer.add_to(torch.zeros(num_tokens, 512), x, logits)
                layer(device.rms_norm(torch.zeros(num_tokens, 512), gate[0], 1e-6, reader=layer), logits)
            biases = [(gate[:, 0], gate[:, 0], down[:, 0])] * 8
            layer = device.pack_experts(
                [(gate, gate, down)] * 8, num_experts=8, routing=routing, biases=biases, activation="clamped_swiglu"
            )
            blocks = [device.place(mxfp4(*shape), form="MXFP4") for shape in ((768, 512), (512, 768))]
            fp4 = [(blocks[0], blocks[0], blocks[1])] * 8
            fp4_layer = device.pack_experts(
                fp4, num_experts=8, routing=routing, biases=biases, activation="clamped_swiglu"
            )
            for num_tokens in (1, 100, 500):
                x, logits = torch.zeros(num_tokens, 512, dtype=dtype), torch.zeros(num_tokens, 8)
                layer(x, logits)
                fp4_layer(x, logits)


def rows_in_order() -> None:
    """What goes around a library's products of experts, which no absent card has."""
    counts = Counts.empty(300, 8, per_token=2, device=torch.device("cpu"))
    chosen, weights = route(torch.zeros(300, 8), per_token=2, renormalises=True, counts=counts)
    ordered = order_rows(torch.zeros(300, 512, dtype=torch.bfloat16), chosen, counts)
    parts = Parts(ordered.rows, weights=weights, places=ordered.places)
    sum_by_weight(parts, torch.zeros(300, 512), adds=True)
    add_and_norm(parts, torch.zeros(300, 512), ordered.rows[0], 1e-6)


def mxfp4(num_rows: int, width: int) -> HostTensor:
    return HostTensor("MXFP4", (num_rows, width), np.zeros((num_rows, width // 32 * 17), np.uint8))


def sampling() -> None:
    """The choice of tokens, and what moves integers and pages."""
    logits, slots = torch.zeros(2, 9000), torch.zeros(2, dtype=torch.int32)
    newest, result = torch.zeros(4, dtype=torch.int32), torch.zeros((2, 2), dtype=torch.int32)
    scratch = GreedyScratch(max_rows=2, vocab_size=9000, device=torch.device("cpu"))
    choose_greedy(logits, slots, newest=newest, result=result, scratch=scratch)
    params = torch.zeros((7, 2), dtype=torch.int32)
    draw_tokens(logits, slots, slots, params, newest=newest, result=result)
    draw_part(logits, slots, params, first_token=9000, max_token=17_999)
    masks = torch.zeros((2, 282), dtype=torch.int32)
    draw_tokens(logits, slots, slots, params, newest=newest, result=result, masks=masks)
    choose_allowed(logits, slots, slots, masks, newest=newest, result=result, scratch=scratch)
    write_entries(torch.zeros(64, dtype=torch.int32), slots, slots)
    for words in (2048, 2056):
        pages = torch.zeros((4, words), dtype=torch.int64)
        copy_pages(pages, slots, pages, slots)
    heads = torch.zeros((4, 3, 2, 4096), dtype=torch.uint8)
    copy_heads(heads[..., :2048], slots, heads[..., 2048:], slots)


def sums_over_ranks() -> None:
    buffers = OneShotBuffers(rank=1, size=2, max_numbers=8192, device=torch.device("cpu"))
    buffers.addresses = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.zeros(8192, dtype=dtype)
        one_shot_all_reduce(x, buffers, out=x, adds=False)
        one_shot_all_reduce(x, buffers, out=torch.zeros(8192), adds=True, max_spins=1 << 21)


GROUPS: dict[str, Callable[[], None]] = {
    "bfloat16": lambda: attention(torch.bfloat16, None, (8, 2, 128)),
    "bfloat16-large-heads": lambda: attention(torch.bfloat16, None, (4, 2, 256)),
    "float32": lambda: attention(torch.float32, None, (8, 2, 128)),
    "float32-large-heads": lambda: attention(torch.float32, None, (4, 2, 256)),
    "float8": lambda: attention(torch.bfloat16, "float8_e4m3fn", (8, 2, 128)),
    "layers": layers,
    "coded": coded,
    "deterministic": deterministic,
    "adapters": adapters,
    "experts": experts,
    "experts in order": rows_in_order,
    "sampling": sampling,
    "ranks": sums_over_ranks,
}


def main() -> None:
    sizes: dict[str, int] = {}

    def compile_only(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            compiled = kernel.warmup(*args, grid=grid, **options)
            sizes[kernel.__name__] = max(compiled.metadata.shared, sizes.get(kernel.__name__, 0))

        return launch

    triton.runtime.driver.set_active(AbsentCard())
    JITFunction.__getitem__ = compile_only
    found: dict[str, dict[str, int] | str] = {}
    for name, group in GROUPS.items():
        try:
            group()
            found[name] = dict(sizes)
        except Exception:  # of any kind: the other groups are told, too
            found[name] = traceback.format_exc()
        sizes.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
