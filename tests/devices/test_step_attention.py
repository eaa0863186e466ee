"""Paged attention of every device against the definition, one row and one head at a time.

Without a GPU the Triton kernels run under Triton's interpreter (conftest.py).
"""

from typing import Any

import numpy as np
import pytest
import torch

from attention_setting import FEW_OF_EACH, MIXES, Setting
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels.rows import Scales
from headwater.devices.device import AttentionGeometry, Device, LayerAttention

pytestmark = pytest.mark.slow

Built = tuple[Device, torch.dtype]


def _windows(size: int) -> tuple[LayerAttention, ...]:
    """In the second layer alone."""
    return LayerAttention(), LayerAttention(window=size)


FLAVOURS = (
    "plain-float32", "plain-bfloat16", "kernels-float32", "kernels-bfloat16", "kernels-float16",
    *(pytest.param(f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in ("float32", "float16", "bfloat16")),
)  # fmt: skip


def _is_worth_interpreting(request: pytest.FixtureRequest) -> bool:
    """Whether half precision may differ from float32, which takes the same way."""
    return request.function is test_attention_is_causal_softmax_over_the_pages and "16-chunks" in request.node.name


@pytest.fixture(params=FLAVOURS)
def built(request: pytest.FixtureRequest) -> Built:
    flavour, dtype = request.param.split("-")
    if flavour == "kernels" and usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    if request.param == "cuda-bfloat16" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    is_interpreted_half = request.param == "cuda-float16" and not torch.cuda.is_available()
    if is_interpreted_half and not _is_worth_interpreting(request):
        pytest.skip("Triton's interpreter takes long, and float32 takes the same way; on a GPU all of them run")
    return _device(flavour), getattr(torch, dtype)


def _device(flavour: str) -> Device:
    if flavour == "cuda":
        return CudaDevice(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return CpuDevice(use_kernels=flavour == "kernels")


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


@pytest.mark.parametrize("has_norm", [False, True])
def test_decodes_scale_what_float8_layers_leave_unscaled(built: Built, has_norm: bool) -> None:
    device, dtype = built
    if not isinstance(device, CudaDevice):
        pytest.skip("no layer leaves anything unscaled on a CPU")
    setting = Setting(MIXES["decodes"], dtype=dtype, has_norm=has_norm)
    setting.scales = Scales(setting.random(5).exp(), setting.random(setting.qkv.shape[1]).exp())
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found.float(), setting.expected(1), rtol=0, atol=2 * _tolerance(dtype))


@pytest.mark.parametrize("page_size", [16, 5])
@pytest.mark.parametrize("rows", [[(20, 700)], [(1, 40), (3, 650), (1, 1100), (44, 60)]])
def test_few_queries_over_long_contexts(built: Built, page_size: int, rows: list[tuple[int, int]]) -> None:
    """On a GPU such contexts are cut into pieces: one read twice, left out or joined with a wrong share shows."""
    device, dtype = built
    if isinstance(device, CudaDevice) and not device.is_gpu and (page_size == 16) == (len(rows) > 1):
        pytest.skip("Triton's interpreter takes long; on a GPU each mix has each size of pages")
    setting = Setting(rows, dtype=dtype, page_size=page_size)
    if isinstance(device, CudaDevice):
        chunks = slice(1, None) if rows[0][0] == 1 else slice(None)
        lens, contexts = np.diff(setting.query_starts)[chunks], setting.context_lens[chunks]
        assert len(device.plan_tiles(setting.geometry, lens, contexts).joins)
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found.float(), setting.expected(1), rtol=0, atol=_tolerance(dtype))


@pytest.mark.parametrize(
    "geometry", [(4, 4, 32), (9, 3, 64), (7, 1, 64), (8, 2, 128), (2, 1, 96), (4, 2, 256), (4, 2, 24)]
)
@pytest.mark.parametrize("has_norm", [False, True])
def test_attention_of_every_geometry(built: Built, geometry: tuple[int, int, int], has_norm: bool) -> None:
    """Heads per KV head decide how queries are stacked; head sizes how blocks are cut."""
    device, dtype = built
    is_interpreted = isinstance(device, CudaDevice) and not device.is_gpu
    quick = ((7, 1, 64), (4, 2, 24), (4, 2, 256))
    if is_interpreted and (geometry not in quick or not has_norm):
        pytest.skip("Triton's interpreter takes long; on a GPU all of them run")
    setting = Setting(MIXES["chunks and decodes"], dtype=dtype, geometry=geometry, has_norm=has_norm)
    found = setting.run(device, layer=0)
    torch.testing.assert_close(found.float(), setting.expected(0), rtol=0, atol=_tolerance(dtype))


@pytest.mark.parametrize("has_sinks", [False, True])
def test_many_queries_of_a_kv_head_over_a_long_context(built: Built, has_sinks: bool) -> None:
    """On a GPU the pieces of their context are joined for all queries together, some pieces at a time."""
    device, dtype = built
    setting = Setting([(1, 40), (1, 650)], dtype=dtype, geometry=(9, 1, 32), has_sinks=has_sinks)
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found.float(), setting.expected(1), rtol=0, atol=_tolerance(dtype))


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (FEW_OF_EACH, {"layers": _windows(7)}),  # smaller than a page, than a chunk and than a block
        (MIXES["chunks and decodes"], {"layers": _windows(70), "score_scale": 0.2}),
        ([(20, 700), (3, 650)], {"layers": _windows(150)}),  # pieces of a tile that lie before the window
        (FEW_OF_EACH, {"rotary_pairs": 24, "norm_offset": 1.0}),
        (FEW_OF_EACH, {"rotary_pairs": 16, "is_interleaved": True}),
        (FEW_OF_EACH, {"norms_whole": True}),
        (FEW_OF_EACH, {"has_sinks": True}),
        ([(1, 40), (1, 650)], {"has_sinks": True}),  # a decode that is cut into pieces
        ([(20, 700), (3, 650)], {"has_sinks": True, "layers": _windows(150)}),
    ],
)
def test_what_families_have_of_their_own(built: Built, rows: list[tuple[int, int]], changes: dict[str, Any]) -> None:
    """Windows, rotary pairs of a part of the head or side by side, norms with an offset or of all heads, sinks."""
    device, dtype = built
    setting = Setting(rows, dtype=dtype, has_norm=True, **changes)
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found.float(), setting.expected(1), rtol=0, atol=_tolerance(dtype))


def test_heads_too_large_are_refused() -> None:
    """Not with a kernel's error in the middle of a step."""
    geometry = AttentionGeometry(num_heads=2, num_kv_heads=1, head_dim=320, norm_eps=1e-6)
    with pytest.raises(ValueError, match="heads of 320 do not run on this device: at most 256"):
        _device("cuda").check_attention(geometry, torch.bfloat16)  # type: ignore[attr-defined]


def test_attention_writes_its_tokens_and_nothing_else(built: Built) -> None:
    """A stray write would corrupt a page that other requests share."""
    device, dtype = built
    setting = Setting(FEW_OF_EACH, dtype=dtype)
    before = setting.kv.pages.clone()
    setting.run(device, layer=1)
    is_new = torch.zeros(before.shape[:1] + before.shape[4:5], dtype=torch.bool)  # [pages, tokens of a page]
    for row, (start, end) in enumerate(zip(setting.query_starts, setting.query_starts[1:], strict=False)):
        for position in setting.positions[start:end]:
            is_new[setting.tables[row, position // 16], position % 16] = True
    changed = (setting.kv.pages != before).any(dim=-1)  # [pages, layers, 2, heads, tokens]
    assert not changed[:, 0].any()
    assert torch.equal(changed[:, 1].all(dim=(1, 2)), is_new)
    assert torch.equal(changed[:, 1].any(dim=2).any(dim=1), is_new)
    shape = setting.geometry
    heads = setting.qkv.view(len(setting.qkv), -1, shape.head_dim)
    values = heads[:, shape.num_heads + shape.num_kv_heads :].float()
    keys = setting.rotated(heads[:, shape.num_heads : shape.num_heads + shape.num_kv_heads], None)
    written = torch.cat([setting.tokens(row, 1, 1)[-q:] for row, (q, _) in enumerate(FEW_OF_EACH)])
    assert torch.equal(written, values)
    written = torch.cat([setting.tokens(row, 1, 0)[-q:] for row, (q, _) in enumerate(FEW_OF_EACH)])
    torch.testing.assert_close(written, keys, rtol=1e-2, atol=_tolerance(dtype))


def test_what_a_page_held_before_does_not_matter(built: Built) -> None:
    """The rest of a last page may hold NaN of a request that failed."""
    device, dtype = built
    settings = [Setting(FEW_OF_EACH, dtype=dtype) for _ in range(2)]
    for row, context in enumerate(settings[1].context_lens):
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
    torch.testing.assert_close(found.float(), setting.expected(0), rtol=0, atol=1e-3 if dtype == torch.float32 else 0.2)


def test_threads_do_not_change_the_result() -> None:
    """Work is cut by rows and heads, never within a sum: more cores must give the same bits."""
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    results = []
    for num_threads in (1, 2, 5):
        setting = Setting(MIXES["chunks and decodes"], dtype=torch.bfloat16)
        results.append(setting.run(CpuDevice(num_threads=num_threads), layer=0))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
