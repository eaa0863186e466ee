"""Paged attention of every device against the definition, one row and one head at a time.

Without a GPU the Triton kernels run under Triton's interpreter (conftest.py).
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from headwater.devices.cpu import CpuDevice
from headwater.devices.cuda import CudaDevice
from headwater.devices.device import AttentionBatch, AttentionGeometry, Device
from headwater.devices.kv_memory import KVLayout, KVMemory
from headwater.devices.native_library import native_library

pytestmark = pytest.mark.slow

NUM_LAYERS = 2
Built = tuple[Device, torch.dtype]
# (queries, context with them) per row: decodes, whole prompts, later chunks, more than one block of keys
MIXES = {
    "one decode": [(1, 1)],
    "decodes": [(1, 5), (1, 64), (1, 65), (1, 200), (1, 129)],
    "a whole prompt": [(70, 70)],
    "chunks and decodes": [(1, 33), (1, 150), (40, 200), (97, 97), (2, 66)],
}


FLAVOURS = (
    "torch-float32", "torch-bfloat16", "native-bfloat16", "cuda-float32", "cuda-float16", "cuda-bfloat16",
)  # fmt: skip


@pytest.fixture(params=FLAVOURS)
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    before = torch.get_num_threads()
    flavour, dtype = request.param.split("-")
    if flavour == "native" and native_library() is None:
        pytest.skip("native kernels are not built or not for this CPU")
    if request.param == "cuda-bfloat16" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    yield _device(flavour), getattr(torch, dtype)
    torch.set_num_threads(before)


def _device(flavour: str) -> Device:
    if flavour == "cuda":
        return CudaDevice(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return CpuDevice(use_native=flavour == "native")


class Setting:
    """A batch over random pages; every token not of this step has random keys and values in its page."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        *,
        dtype: torch.dtype,
        page_size: int = 16,
        geometry: tuple[int, int, int] = (6, 2, 64),
        has_norm: bool = False,
    ) -> None:
        self.generator = torch.Generator().manual_seed(1)
        num_heads, num_kv_heads, head_dim = geometry
        self.geometry = AttentionGeometry(num_heads, num_kv_heads, head_dim, norm_eps=1e-6)
        num_pages = [-(-context // page_size) for _, context in rows]
        ids = np.random.default_rng(2).permutation(sum(num_pages) + 3).astype(np.int32)
        self.tables = np.full((len(rows), max(num_pages) + 1), -1, dtype=np.int32)
        for row, num in enumerate(num_pages):
            self.tables[row, :num], ids = ids[:num], ids[num:]
        layout = KVLayout(NUM_LAYERS, num_kv_heads, head_dim, page_size, dtype)
        self.kv = KVMemory(layout, self.random(len(ids) + sum(num_pages), *layout.page_shape).to(dtype))
        self.batch = AttentionBatch(
            query_starts=np.cumsum([0, *(queries for queries, _ in rows)], dtype=np.int32),
            context_lens=np.array([context for _, context in rows], dtype=np.int32),
            page_tables=self.tables,
            positions=np.concatenate([np.arange(n - q, n) for q, n in rows]).astype(np.int32),
        )
        num_tokens = len(self.batch.positions)
        self.qkv = self.random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        angles = self.random(num_tokens, head_dim // 2) * 3
        self.cos, self.sin = angles.cos(), angles.sin()
        norm = [1 + 0.3 * self.random(head_dim) for _ in range(2)]
        self.norms = [it.to(dtype) for it in norm] if has_norm else [None, None]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def run(self, device: Device, layer: int) -> torch.Tensor:
        place = device.torch_device
        kv = KVMemory(self.kv.layout, self.kv.pages.to(place))
        attention = device.plan_attention(
            self.geometry, self.batch, cos=self.cos.to(place), sin=self.sin.to(place), kv=kv
        )
        norms = [None if norm is None else norm.to(place) for norm in self.norms]
        found = attention(self.qkv.to(place, copy=True), layer, *norms).cpu()
        self.kv.pages.copy_(kv.pages)
        return found

    def tokens(self, row: int, layer: int, which: int) -> torch.Tensor:
        """All keys (0) or values (1) of a row. float32[context, heads, head_dim]"""
        pages = self.kv.pages[self.tables[row][self.tables[row] >= 0], layer, which]
        flat = pages.transpose(1, 2).flatten(0, 1)
        return flat[: int(self.batch.context_lens[row])].float()

    def rotated(self, x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        x = x.float()
        if norm is not None:
            x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.float()
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def expected(self, layer: int) -> torch.Tensor:
        """Softmax attention by its definition, over what the pages hold after the step."""
        shape = self.geometry
        heads = self.qkv.view(len(self.qkv), -1, shape.head_dim)
        queries = self.rotated(heads[:, : shape.num_heads], self.norms[0])
        out = torch.empty(len(self.qkv), shape.num_heads, shape.head_dim)
        for row in range(len(self.batch.context_lens)):
            keys, values = self.tokens(row, layer, 0), self.tokens(row, layer, 1)
            start, end = self.batch.query_starts[row], self.batch.query_starts[row + 1]
            for token in range(start, end):
                visible = int(self.batch.positions[token]) + 1
                for head in range(shape.num_heads):
                    kv_head = head // (shape.num_heads // shape.num_kv_heads)
                    scores = keys[:visible, kv_head] @ queries[token, head] * shape.head_dim**-0.5
                    out[token, head] = scores.softmax(dim=0) @ values[:visible, kv_head]
        return out.flatten(1)


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 0.03, torch.float16: 0.01}.get(dtype, 1e-5)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("page_size", [16, 5])
def test_attention_is_causal_softmax_over_the_pages(built: Built, mix: str, page_size: int) -> None:
    """A wrong mask, page, stacking of heads or block border shows in some row."""
    device, dtype = built
    setting = Setting(MIXES[mix], dtype=dtype, page_size=page_size)
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found.float(), setting.expected(1), rtol=0, atol=_tolerance(dtype))


@pytest.mark.parametrize("page_size", [16, 5])
@pytest.mark.parametrize("rows", [[(20, 700)], [(1, 40), (3, 650), (1, 1100), (64, 80)]])
def test_few_queries_over_long_contexts(built: Built, page_size: int, rows: list[tuple[int, int]]) -> None:
    """On a GPU such contexts are cut into pieces: one read twice, left out or joined with a wrong share shows."""
    device, dtype = built
    setting = Setting(rows, dtype=dtype, page_size=page_size)
    if isinstance(device, CudaDevice):
        chunks = slice(1, None) if rows[0][0] == 1 else slice(None)
        lens, contexts = np.diff(setting.batch.query_starts)[chunks], setting.batch.context_lens[chunks]
        assert len(device.plan_tiles(setting.geometry, lens, contexts).joins)
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found.float(), setting.expected(1), rtol=0, atol=_tolerance(dtype))


@pytest.mark.parametrize(
    "geometry", [(4, 4, 32), (9, 3, 64), (7, 1, 64), (8, 2, 128), (2, 1, 96), (4, 2, 256), (4, 2, 24)]
)
@pytest.mark.parametrize("has_norm", [False, True])
def test_attention_of_every_geometry(built: Built, geometry: tuple[int, int, int], has_norm: bool) -> None:
    """Heads per KV head decide how queries are stacked; head sizes how blocks are cut (24 falls back)."""
    device, dtype = built
    is_interpreted = isinstance(device, CudaDevice) and not device.is_gpu
    quick = ((7, 1, 64), (4, 2, 24), (4, 2, 256))
    if is_interpreted and (geometry not in quick or not has_norm or dtype != torch.float32):
        pytest.skip("Triton's interpreter takes long; on a GPU all of them run")
    setting = Setting(MIXES["chunks and decodes"], dtype=dtype, geometry=geometry, has_norm=has_norm)
    if isinstance(device, CudaDevice) and dtype == torch.float32 and geometry[2] > 128:
        with pytest.raises(ValueError, match="heads of 256 in float32"):
            device.check_attention(setting.geometry, dtype)
        return
    found = setting.run(device, layer=0)
    torch.testing.assert_close(found.float(), setting.expected(0), rtol=0, atol=_tolerance(dtype))


def test_attention_writes_its_tokens_and_nothing_else(built: Built) -> None:
    """A stray write would corrupt a page that other requests share."""
    device, dtype = built
    setting = Setting(MIXES["chunks and decodes"], dtype=dtype)
    before = setting.kv.pages.clone()
    setting.run(device, layer=1)
    is_new = torch.zeros(before.shape[:1] + before.shape[4:5], dtype=torch.bool)  # [pages, tokens of a page]
    for row, (start, end) in enumerate(zip(setting.batch.query_starts, setting.batch.query_starts[1:], strict=False)):
        for position in setting.batch.positions[start:end]:
            is_new[setting.tables[row, position // 16], position % 16] = True
    changed = (setting.kv.pages != before).any(dim=-1)  # [pages, layers, 2, heads, tokens]
    assert not changed[:, 0].any()
    assert torch.equal(changed[:, 1].all(dim=(1, 2)), is_new)
    assert torch.equal(changed[:, 1].any(dim=2).any(dim=1), is_new)
    shape = setting.geometry
    heads = setting.qkv.view(len(setting.qkv), -1, shape.head_dim)
    values = heads[:, shape.num_heads + shape.num_kv_heads :].float()
    keys = setting.rotated(heads[:, shape.num_heads : shape.num_heads + shape.num_kv_heads], None)
    written = torch.cat([setting.tokens(row, 1, 1)[-q:] for row, (q, _) in enumerate(MIXES["chunks and decodes"])])
    assert torch.equal(written, values)
    written = torch.cat([setting.tokens(row, 1, 0)[-q:] for row, (q, _) in enumerate(MIXES["chunks and decodes"])])
    torch.testing.assert_close(written, keys, rtol=1e-2, atol=_tolerance(dtype))


def test_what_a_page_held_before_does_not_matter(built: Built) -> None:
    """The rest of a last page may hold NaN of a request that failed."""
    device, dtype = built
    settings = [Setting(MIXES["chunks and decodes"], dtype=dtype) for _ in range(2)]
    for row, context in enumerate(settings[1].batch.context_lens):
        last_page, used = settings[1].tables[row, (context - 1) // 16], (context - 1) % 16 + 1
        settings[1].kv.pages[last_page, :, :, :, used:] = float("nan")
    clean, dirty = (setting.run(device, layer=0) for setting in settings)
    assert torch.equal(clean, dirty)


def test_large_scores_do_not_overflow(built: Built) -> None:
    """The softmax must subtract the largest score first, and go on from block to block with a larger one."""
    device, dtype = built
    setting = Setting([(1, 200)], dtype=dtype)
    setting.kv.pages[:, :, 0] *= 60
    found = setting.run(device, layer=0)
    assert found.isfinite().all()
    torch.testing.assert_close(
        found.float(), setting.expected(0), rtol=0, atol=1e-3 if dtype == torch.float32 else 0.2
    )


def test_threads_do_not_change_the_result() -> None:
    """Work is cut by rows and heads, never within a sum: more cores must give the same bits."""
    if native_library() is None:
        pytest.skip("native kernels are not built or not for this CPU")
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 5):
        setting = Setting(MIXES["chunks and decodes"], dtype=torch.bfloat16)
        results.append(setting.run(CpuDevice(num_threads=num_threads), layer=0))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
