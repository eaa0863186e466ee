"""Whole prompts set apart for another backend: what it is given, and that nothing else changes.

Without a GPU a backend in PyTorch takes the place of FlashAttention 3, which runs where it is installed.
"""

import numpy as np
import pytest
import torch
from attention_setting import Setting

from headwater.devices.cuda import CudaDevice
from headwater.devices.device import AttentionGeometry
from headwater.devices.whole_prompts import FlashAttention3, num_before_whole, open_whole_prompts
from torch_whole_prompts import TorchWholePrompts

pytestmark = pytest.mark.slow

GPU = torch.cuda.is_available()
PLACE = torch.device("cuda" if GPU else "cpu")
MIXES = {
    "prompts alone": [(33, 33), (20, 20), (2, 2)],
    "decodes, a chunk, prompts": [(1, 33), (1, 70), (20, 90), (37, 37), (26, 26)],
    "a chunk behind a prompt": [(25, 25), (20, 60), (30, 30)],
    "no prompt at its end": [(1, 9), (25, 25), (10, 60)],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn] if GPU else [None])  # interpreted, 8 bits round oddly
def test_prompts_apart_attend_as_all_others_do(mix: str, kv_dtype: torch.dtype | None) -> None:
    """A wrong first token, keys left as they were, or rows computed twice or not at all show in the output."""
    rows = MIXES[mix]
    device = CudaDevice(PLACE)
    device.whole_prompts = backend = TorchWholePrompts()
    setting = Setting(rows, dtype=torch.float32, kv_dtype=kv_dtype, has_norm=True)
    beside = Setting(rows, dtype=torch.float32, kv_dtype=kv_dtype, has_norm=True)
    own = beside.run(CudaDevice(PLACE), layer=1)
    found = setting.run(device, layer=1)
    whole = [q for q, context in rows[num_before_whole(*_lens(rows)) :] if q == context]
    assert backend.seen == ([whole] if whole else [])
    assert torch.equal(setting.kv.memory, beside.kv.memory)
    # over 8-bit pages, prompts apart see what was rounded to them as it was before
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5 if kv_dtype is None else 0.25)


def _lens(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    lens = np.array(rows, dtype=np.int32)
    return lens[:, 0], lens[:, 1]


@pytest.mark.parametrize(
    ("rows", "expected"), [([(5, 5), (3, 3)], 0), ([(5, 9), (3, 3)], 1), ([(5, 5), (3, 9)], 2), ([], 0)]
)
def test_the_prompts_that_a_step_ends_with(rows: list[tuple[int, int]], expected: int) -> None:
    lens = np.array(rows, dtype=np.int32).reshape(-1, 2)
    assert num_before_whole(lens[:, 0], lens[:, 1]) == expected


@pytest.mark.skipif(GPU, reason="is about machines without a GPU")
def test_without_a_gpu_nothing_is_set_apart() -> None:
    assert open_whole_prompts("auto", torch.device("cpu")) is None


def _flash_attention() -> FlashAttention3:
    if not GPU:
        pytest.skip("needs an NVIDIA GPU")
    try:
        return FlashAttention3(PLACE)
    except ValueError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("geometry", [(6, 2, 64), (8, 8, 128), (7, 1, 64), (4, 2, 256), (4, 2, 96)])
def test_flash_attention_attends_as_our_kernels_do(mix: str, geometry: tuple[int, int, int]) -> None:
    backend = _flash_attention()
    device = CudaDevice(PLACE)
    device.whole_prompts = backend
    setting = Setting(MIXES[mix], dtype=torch.bfloat16, geometry=geometry, has_norm=True)
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found.float(), setting.expected(1), rtol=0, atol=0.03)


def test_flash_attention_says_what_it_does_not_take() -> None:
    backend = _flash_attention()
    geometry = AttentionGeometry(4, 2, 64, 1e-6)
    assert backend.refusal(geometry, torch.bfloat16) is None
    assert "not float16" in str(backend.refusal(geometry, torch.float16))
    device = CudaDevice(PLACE, attention="fa3")
    with pytest.raises(ValueError, match="--attention-backend fa3 computes bfloat16, not float32"):
        device.check_attention(geometry, torch.float32)
    assert not device.sets_whole_apart(geometry, torch.float32)
    assert device.sets_whole_apart(geometry, torch.bfloat16)
