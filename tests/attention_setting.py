"""A step over random pages, and its attention by the definition: what the tests of attention share.

The step is a plan, which the code of the runners turns into what the kernels read.
"""

from typing import Any

import numpy as np
import torch

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.program import StepArrays
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.float8 import from_float8, to_float8
from headwater.devices.cuda.kernels.rows import Scales, Unscaled
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.cuda.torch_tensors import to_host
from headwater.devices.device import AttentionGeometry, RotaryAngles
from headwater.devices.host_tensor import HostTensor
from headwater.devices.kv_memory import KVLayout
from headwater.execution.batch import SlotTable
from headwater.execution.decode_inputs import DecodeInputs
from headwater.execution.device_slots import DeviceSlots
from headwater.execution.prompt_steps import PromptSteps
from headwater.execution.step_inputs import MixedInputs
from headwater.scheduling.plan import PageUpdate, StepPlan

NUM_LAYERS = 2
# (queries, context with them) per row: decodes, whole prompts, later chunks, more than one block of keys and more than
# one tile of queries; Triton's interpreter takes its time for each token
MIXES = {
    "one decode": [(1, 1)],
    "decodes": [(1, 5), (1, 64), (1, 65), (1, 200), (1, 129)],
    "a whole prompt": [(70, 70)],
    "chunks and decodes": [(1, 33), (1, 150), (45, 200), (9, 9), (2, 66)],
}
# for tests that ask where something is read or written, not how it is computed
FEW_OF_EACH = [(1, 33), (1, 70), (20, 60), (2, 18)]


class Setting:
    """A step over random pages; every token not of this step has random keys and values in its page.

    `rows` are (queries, context with them). Single queries before the first chunk are decodes. Behind a row's pages its
    page table names a page of large numbers, as an earlier request of the slot may have left it.
    """

    def __init__(
        self,
        rows: list[tuple[int, int]],
        *,
        dtype: torch.dtype,
        kv_dtype: str | None = None,
        page_size: int = 16,
        geometry: tuple[int, int, int] = (6, 2, 64),
        has_norm: bool = False,
        **changes: Any,
    ) -> None:
        """`changes`: other fields of the geometry."""
        self.generator = torch.Generator().manual_seed(1)
        num_heads, num_kv_heads, head_dim = geometry
        self.geometry = AttentionGeometry(num_heads, num_kv_heads, head_dim, norm_eps=1e-6, **changes)
        num_pages = [-(-context // page_size) for _, context in rows]
        ids = np.random.default_rng(2).permutation(sum(num_pages) + 3).astype(np.int32)
        self.tables = np.full((len(rows), max(num_pages) + 1), -1, dtype=np.int32)
        for row, num in enumerate(num_pages):
            self.tables[row, :num], ids = ids[:num], ids[num:]
        layout = KVLayout(NUM_LAYERS, num_kv_heads, head_dim, page_size, kv_dtype or str(dtype).removeprefix("torch."))
        self.stale_page = int(ids[0])
        self.kv = self._random_kv(layout, len(ids) + sum(num_pages))
        self.query_starts = np.cumsum([0, *(queries for queries, _ in rows)], dtype=np.int32)
        self.context_lens = np.array([context for _, context in rows], dtype=np.int32)
        self.positions = np.concatenate([np.arange(n - q, n) for q, n in rows]).astype(np.int32)
        num_tokens = len(self.positions)
        self.qkv = self.random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        inv_freq = self.random(head_dim // 2).abs() * 3
        inv_freq[self.geometry.rotary_pairs or head_dim :] = 0
        self.angles = RotaryAngles(inv_freq.numpy(), 1.0)
        angles = torch.arange(int(self.context_lens.max()), dtype=torch.float32)[:, None] * inv_freq
        self.rotary = (angles.cos(), angles.sin())  # of every position
        self.cos, self.sin = (it[self.positions] for it in self.rotary)
        sizes = [num * head_dim if self.geometry.norms_whole else head_dim for num in (num_heads, num_kv_heads)]
        norm = [1 - self.geometry.norm_offset + 0.3 * self.random(size) for size in sizes]
        self.norms = [it.to(dtype) for it in norm] if has_norm else [None, None]
        self.scales: Scales | None = None  # what decodes on a GPU are still to be multiplied by
        self.sinks = 2 * self.random(num_heads).to(dtype) if self.geometry.has_sinks else None

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def _random_kv(self, layout: KVLayout, num_pages: int) -> CudaKVMemory:
        values = self.random(num_pages, *layout.page_shape)
        values[self.stale_page] = 1000
        kv = CudaKVMemory(layout, torch.zeros((num_pages, layout.page_bytes), dtype=torch.uint8))
        if kv.exponents is None:
            kv.pages.copy_(values)
        else:
            stored, exponents = to_float8(values, kv.pages.dtype)
            kv.pages.copy_(stored)
            kv.exponents.copy_(exponents)
        return kv

    def plan(self) -> StepPlan:
        """The step as a scheduler would plan it, row r in slot r. Nothing is sampled."""
        num_rows, num_tokens = len(self.context_lens), np.diff(self.query_starts)
        is_chunk = num_tokens > 1
        tables = np.where(self.tables < 0, self.stale_page, self.tables).astype(np.int32)
        return StepPlan(
            step_id=0,
            assignments=(),
            page_updates=tuple(PageUpdate(slot=row, first=0, pages=pages) for row, pages in enumerate(tables)),
            slots=np.arange(num_rows, dtype=np.int32),
            uses=np.ones(num_rows, dtype=np.int64),
            num_computed=self.context_lens - num_tokens,
            num_tokens=num_tokens,
            samples=np.zeros(num_rows, dtype=np.bool_),
            token_ids=np.zeros(len(self.positions), dtype=np.int32),
            num_decodes=int(is_chunk.argmax()) if is_chunk.any() else num_rows,
            num_outputs=np.zeros(num_rows, dtype=np.int32),
        )

    def run(self, device: CpuDevice | CudaDevice, layer: int) -> torch.Tensor:
        if isinstance(device, CpuDevice):
            return self._attend_on_cpu(device, layer)
        kv = CudaKVMemory(self.kv.layout, self.kv.memory.to(device.torch_device))
        found = self._attend_on_gpu(device, kv, layer).cpu()
        self.kv.memory.copy_(kv.memory)
        return found

    def _attend_on_cpu(self, device: CpuDevice, layer: int) -> torch.Tensor:
        """As CpuRunner does: a recorded program, whose queries, keys and values are rows of a matrix."""
        layout = self.kv.layout
        slots = SlotTable(max_running=len(self.tables), max_pages=self.tables.shape[1], page_size=layout.page_size)
        plan = self.plan()
        slots.apply(plan)
        inputs = slots.inputs(plan)
        work = device.attention_work(
            self.geometry,
            inputs.query_starts,
            inputs.context_lens,
            page_tables=inputs.page_tables,
            page_size=layout.page_size,
            num_decodes=plan.num_decodes,
        )
        step = StepArrays(
            token_ids=np.arange(len(self.positions), dtype=np.int32),
            positions=inputs.positions,
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            page_tables=inputs.page_tables,
            selected=np.zeros(0, dtype=np.int32),
            kv=self.kv.memory.numpy(),
            chunks=work.chunks,
            queries_per_chunk=work.queries_per_chunk,
            partial_slots=work.partial_slots,
            next_sharing=work.next_sharing,
            num_decodes=plan.num_decodes,
        )
        program = device.start_program()
        attention = device.record_attention(program, self.geometry, layout, rotary=[self.angles])
        qkv = device.pack_linear([HostTensor.of(self.qkv.float().numpy())]).embed(program.token_ids)
        norms = [None if norm is None else to_host(norm) for norm in (*self.norms, self.sinks)]
        out = program.keep(attention(qkv, layer, *norms))
        program.run(step)
        return torch.from_numpy(program.view(out, step).copy())

    def _attend_on_gpu(self, device: CudaDevice, kv: CudaKVMemory, layer: int) -> torch.Tensor:
        """As GpuRunner does: decodes alone, or a step with prompts."""
        place, plan = device.torch_device, self.plan()
        slots = DeviceSlots(place, max_running=len(self.tables), max_pages=self.tables.shape[1])
        slots.apply(plan)
        rotary = ((self.rotary[0].to(place),), (self.rotary[1].to(place),))
        qkv = self.qkv.to(place, copy=True)
        norms = [None if norm is None else norm.to(place) for norm in (*self.norms, self.sinks)]
        if plan.num_decodes == plan.num_rows:
            decodes = DecodeInputs(slots, rotary=rotary)
            decodes.stage(plan.slots, plan.num_computed)
            attention = device.plan_attention(self.geometry, decodes.batch(plan.num_rows), kv=kv)
            if self.scales is None:
                return attention(qkv, layer, *norms)
            scales = Scales(self.scales.of_rows.to(place), self.scales.of_columns.to(place))
            product = (qkv.float() / scales.of_rows[:, None] / scales.of_columns).to(qkv.dtype)
            return attention(Unscaled(product, scales), layer, *norms)

        def forward(inputs: MixedInputs) -> torch.Tensor:
            return device.plan_attention(self.geometry, inputs.batch, kv=kv)(qkv, layer, *norms)

        steps = PromptSteps(
            device,
            forward,
            geometry=self.geometry,
            dtype=self.qkv.dtype,
            slots=slots,
            rotary=rotary,
            sizes=(),
            pool=None,
        )
        return steps.launch(plan, np.empty(0, dtype=np.int32)).hidden

    def tokens(self, row: int, layer: int, which: int) -> torch.Tensor:
        """All keys (0) or values (1) of a row. float32[context, heads, head_dim]"""
        used = self.tables[row][self.tables[row] >= 0]
        pages = self.kv.pages[used, layer, which]
        if self.kv.exponents is not None:
            pages = from_float8(pages, self.kv.exponents[used, layer, which], torch.float32)
        flat = pages.transpose(1, 2).flatten(0, 1)
        return flat[: int(self.context_lens[row])].float()

    def rotated(self, x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """By the definition, and then in the order that prepared heads have."""
        x, shape = x.float(), self.geometry
        if norm is not None:
            flat = x.flatten(1) if shape.norms_whole else x
            scaled = flat * (flat.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (norm.float() + shape.norm_offset)
            x = scaled.view_as(x)
        pairs = shape.rotary_pairs or shape.head_dim // 2
        index = torch.arange(pairs)
        firsts, seconds = (2 * index, 2 * index + 1) if shape.is_interleaved else (index, index + pairs)
        cos, sin = self.cos[:, None, :pairs], self.sin[:, None, :pairs]
        first, second, found = x[..., firsts], x[..., seconds], x.clone()
        found[..., firsts], found[..., seconds] = first * cos - second * sin, second * cos + first * sin
        order = shape.pair_order()
        return found if order is None else found[..., torch.from_numpy(order)]

    def expected(self, layer: int) -> torch.Tensor:
        """Softmax attention by its definition, over what the pages hold after the step."""
        shape = self.geometry
        heads = self.qkv.view(len(self.qkv), -1, shape.head_dim)
        queries = self.rotated(heads[:, : shape.num_heads], self.norms[0])
        queries = queries.unflatten(1, (shape.num_kv_heads, -1))  # [tokens, G, H / G, D]
        out = torch.empty_like(queries)
        sinks = None if self.sinks is None else self.sinks.float().view(shape.num_kv_heads, -1, 1)
        for row in range(len(self.context_lens)):
            keys, values = (self.tokens(row, layer, which).transpose(0, 1) for which in (0, 1))  # [G, context, D]
            start, end = self.query_starts[row], self.query_starts[row + 1]
            for token in range(start, end):
                visible = int(self.positions[token]) + 1
                seen = slice(max(0, visible - (shape.layer(layer).window or visible)), visible)
                scores = queries[token] @ keys[:, seen].mT * shape.scale
                if sinks is not None:
                    scores = torch.cat((scores, sinks), dim=-1)
                weights = scores.softmax(dim=-1)[..., : visible - seen.start]
                out[token] = weights @ values[:, seen]
        return out.flatten(1)
