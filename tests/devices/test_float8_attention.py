"""Attention over 8-bit keys and values: what is stored, and what comes of it. Without a GPU, interpreted."""

import numpy as np
import pytest
import torch

from attention_setting import FEW_OF_EACH, MIXES, Setting
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.float8 import from_float8, to_float8
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.device import Device
from headwater.devices.kv_memory import FLOAT8_DTYPES, KVLayout

pytestmark = pytest.mark.slow

GPU = torch.cuda.is_available()


@pytest.fixture(params=["kernels", "plain", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    if request.param != "cuda":
        return CpuDevice(use_kernels=request.param == "kernels")
    if not GPU:
        _round_as_the_hardware(monkeypatch)
    return CudaDevice(torch.device("cuda" if GPU else "cpu"))


def _round_as_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter loses the carry where rounding to 8 bits overflows the mantissa."""
    import triton.language as tl
    from triton.runtime import interpreter

    of_type = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if target in of_type and source == tl.float32:
            values = torch.from_numpy(np.ascontiguousarray(data)).to(of_type[target])
            return values.view(torch.uint8).numpy()
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES)
def test_numbers_of_any_size_keep_their_bits(dtype: str) -> None:
    """Without a scale, values below 2^-9 would become zero, and large keys infinite."""
    sizes = torch.tensor([1e-9, 1e-4, 1.0, 300.0, 1e30])
    x = torch.randn(5, 200, 64, generator=torch.Generator().manual_seed(1)) * sizes[:, None, None]
    x[0, 0] = 0
    found = from_float8(*to_float8(x, getattr(torch, dtype)), torch.float32)
    assert torch.equal(found[0, 0], x[0, 0])
    step = 2.0 ** -(4 if dtype == "float8_e4m3fn" else 3)  # half of a bit of the mantissa
    # below 2^-14 of a head's largest number, what matters is the error beside that
    allowed = x.abs() * step + x.abs().amax(dim=-1, keepdim=True) * 2.0**-17
    assert ((found - x).abs() <= allowed).all()


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_a_page_holds_its_exponents_and_no_neighbours(page_size: int) -> None:
    """A tier copies the bytes of a page, or of a layer of it: nothing of the head may lie elsewhere."""
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=24, page_size=page_size, dtype="float8_e4m3fn")
    half = KVLayout(num_layers=3, num_kv_heads=2, head_dim=24, page_size=page_size, dtype="bfloat16")
    assert layout.layer_bytes % 16 == 0
    assert half.page_bytes / 2 < layout.page_bytes <= half.page_bytes / 2 * 25 / 24 + 3 * 15
    kv = CudaKVMemory(layout, torch.zeros((4, layout.page_bytes), dtype=torch.uint8))
    assert kv.exponents is not None
    kv.pages[2, 1] = 1.0
    kv.exponents[2, 1] = 7
    changed = kv.memory.view(4, 3, -1).ne(0)
    assert changed.any(dim=-1).nonzero().tolist() == [[2, 1]]
    assert int(changed.sum()) == 2 * 2 * page_size * 25
    other = CudaKVMemory(layout, torch.zeros_like(kv.memory))
    other.memory[0] = kv.memory[2]
    assert other.exponents is not None
    assert torch.equal(other.pages[0].float(), kv.pages[2].float())
    assert torch.equal(other.exponents[0], kv.exponents[2])


@pytest.mark.parametrize("mix", ["decodes", "chunks and decodes"])
@pytest.mark.parametrize("dtype", FLOAT8_DTYPES)
def test_attention_over_what_the_pages_hold(device: Device, mix: str, dtype: str) -> None:
    """A wrong exponent, or one of another token, head or layer, shows in some row."""
    page_size = 16 if dtype == "float8_e4m3fn" else 5
    setting = Setting(MIXES[mix], dtype=torch.float32, kv_dtype=dtype, page_size=page_size, has_norm=True)
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found, setting.expected(1), rtol=0, atol=1e-5)


def test_what_is_written_is_what_torch_would_write(device: Device) -> None:
    """Keys and values of decodes and chunks, bit for bit; pages do not depend on who wrote them."""
    rows = FEW_OF_EACH
    setting = Setting(rows, dtype=torch.float32, kv_dtype="float8_e4m3fn")
    assert setting.kv.exponents is not None
    before = setting.kv.memory.view(len(setting.kv.pages), 2, -1)[:, 0].clone()
    setting.run(device, layer=1)
    assert torch.equal(setting.kv.memory.view(len(before), 2, -1)[:, 0], before)
    shape = setting.geometry
    heads = setting.qkv.view(len(setting.qkv), -1, shape.head_dim)
    values = heads[:, shape.num_heads + shape.num_kv_heads :]
    keys = setting.rotated(heads[:, shape.num_heads : shape.num_heads + shape.num_kv_heads], None)
    written = torch.cat([setting.tokens(row, 1, 1)[-q:] for row, (q, _) in enumerate(rows)])
    assert torch.equal(written, from_float8(*to_float8(values, torch.float8_e4m3fn), torch.float32))
    written = torch.cat([setting.tokens(row, 1, 0)[-q:] for row, (q, _) in enumerate(rows)])
    # a rotation rounds otherwise here and there, and may tip a number over to the next
    rounded = from_float8(*to_float8(keys, torch.float8_e4m3fn), torch.float32)
    assert (written != rounded).float().mean() < 1e-3
    torch.testing.assert_close(written, rounded, rtol=2.0**-3, atol=1e-3)


def test_garbage_behind_a_context_does_not_matter(device: Device) -> None:
    """The rest of a last page, and pages of nobody, hold any bytes, NaN and exponents out of range among them."""
    rows = FEW_OF_EACH
    settings = [Setting(rows, dtype=torch.float32, kv_dtype="float8_e4m3fn") for _ in range(2)]
    dirty = settings[1].kv
    assert dirty.exponents is not None
    for row, context in enumerate(settings[1].context_lens):
        last_page, used = settings[1].tables[row, (context - 1) // 16], (context - 1) % 16 + 1
        dirty.pages.view(torch.uint8)[last_page, :, :, :, used:] = 0xFF
        dirty.exponents[last_page, :, :, :, used:] = -128
    unused = np.setdiff1d(np.arange(dirty.num_pages), settings[1].tables)
    dirty.memory[unused] = 0x80
    found = [setting.run(device, layer=0) for setting in settings]
    assert torch.equal(found[0], found[1])
