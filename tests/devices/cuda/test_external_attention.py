"""Chunks that an external backend computes: what it is given, and that nothing else changes.

Without a GPU a backend in PyTorch takes the place of FlashAttention 3, which runs where it is installed.
"""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from attention_setting import Setting
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.external_attention import (
    MAX_GATHERED_BYTES,
    ExternalAttention,
    FlashAttention3,
    num_own_chunks,
    open_external_attention,
)
from headwater.devices.cuda.kernels.gather import gather
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.cuda.paged_batch import Contexts
from headwater.devices.device import AttentionGeometry
from headwater.devices.errors import UnsupportedError
from headwater.launch.config import ServerArgs
from headwater.launch.cuda_placement import CudaPlacement
from headwater.messages.state import GpuKernels
from torch_external_attention import TorchExternalAttention

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

GPU = torch.cuda.is_available()
PLACE = torch.device("cuda" if GPU else "cpu")
MIN_TOKENS = 8  # of a chunk behind a prefix; on a card it is more, for speed alone
MIXES = {
    "prompts alone": [(11, 11), (8, 8), (2, 2)],
    "decodes, a short chunk, prompts": [(1, 33), (1, 70), (7, 90), (15, 15), (9, 9)],
    "a long chunk behind a prompt": [(10, 10), (8, 60), (12, 12)],
    "a short chunk at the end": [(1, 9), (10, 10), (5, 60)],
    "long chunks": [(1, 9), (5, 50), (16, 200), (8, 9)],
}
EXTERNAL = {
    "prompts alone": [(11, 11), (8, 8), (2, 2)],
    "decodes, a short chunk, prompts": [(15, 15), (9, 9)],
    "a long chunk behind a prompt": [(10, 10), (8, 60), (12, 12)],
    "a short chunk at the end": [],
    "long chunks": [(16, 200), (8, 9)],
}


def _device(backend: ExternalAttention | None) -> CudaDevice:
    device = CudaDevice(PLACE)
    device.external_attention, device.min_external_tokens = backend, MIN_TOKENS
    return device


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"] if GPU else [None])  # interpreted, 8 bits round oddly
def test_external_chunks_attend_as_all_others_do(mix: str, kv_dtype: str | None) -> None:
    """A wrong first token, keys left as they were, or rows computed twice or not at all show in the output."""
    backend = TorchExternalAttention()
    setting, beside = (Setting(MIXES[mix], dtype=torch.float32, kv_dtype=kv_dtype, has_norm=True) for _ in range(2))
    own = beside.run(_device(None), layer=1)
    found = setting.run(_device(backend), layer=1)
    assert backend.seen == ([EXTERNAL[mix]] if EXTERNAL[mix] else [])
    assert torch.equal(setting.kv.memory, beside.kv.memory)
    # whole prompts see what was rounded to 8-bit pages as it was before
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5 if kv_dtype is None else 0.25)


@pytest.mark.parametrize("page_size", [16, 5])
@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn", "float8_e5m2"])
def test_gathered_contexts_are_what_the_pages_hold(page_size: int, kv_dtype: str) -> None:
    """Keys and values by token and head, in the order of the rows; nothing of what lies behind a context."""
    rows = [(1, 70), (1, 3), (1, 130)]
    setting = Setting(rows, dtype=torch.float32, kv_dtype=kv_dtype, page_size=page_size, geometry=(6, 2, 24))
    starts = torch.tensor([0, 70, 73, 203], dtype=torch.int32, device=PLACE)
    contexts = Contexts(torch.arange(3, dtype=torch.int32, device=PLACE), starts, num_tokens=203, longest=130)
    tables = torch.from_numpy(setting.tables).to(PLACE)
    kv = CudaKVMemory(setting.kv.layout, setting.kv.memory.to(PLACE))
    found = gather(contexts, tables, setting.geometry, kv=kv, layer=1, dtype=torch.float32).cpu()
    for which in (0, 1):
        expected = torch.cat([setting.tokens(row, 1, which) for row in range(3)])
        assert torch.equal(found[:, which], expected)


GEOMETRY = AttentionGeometry(32, 8, 128, 1e-6)
LONG = MAX_GATHERED_BYTES // 4096  # tokens of this geometry that fit where contexts are gathered


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(5, 5), (3, 3)], 0),
        ([(5, 9), (3, 3)], 1),
        ([(5, 5), (3, 9)], 2),
        ([(5, 9), (20, 40), (3, 3)], 1),
        ([(20, 40)], 0),
        ([(20, 40), (5, 9)], 2),
        ([(20, LONG - 3), (3, 3)], 0),
        ([(20, LONG - 2), (3, 3)], 1),  # too long to be gathered; the prompt behind it needs no gathering
        ([(LONG, LONG), (9, 9)], 0),
        ([], 0),
    ],
)
def test_which_chunks_are_external(rows: list[tuple[int, int]], expected: int) -> None:
    lens = np.array(rows, dtype=np.int32).reshape(-1, 2)
    assert num_own_chunks(lens[:, 0], lens[:, 1], GEOMETRY, min_tokens=MIN_TOKENS) == expected


@pytest.mark.skipif(GPU, reason="is about machines without a GPU")
def test_without_a_gpu_nothing_is_external() -> None:
    assert open_external_attention("auto", torch.device("cpu")) == (None, "")


@pytest.mark.parametrize(("capability", "reason"), [((8, 9), r"9\.0 \(Hopper\); a card has 8\.9"), ((9, 0), "fa3-fwd")])
def test_flash_attention_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str
) -> None:
    """Asked for, it is an error that says what is missing; auto goes on without it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setitem(sys.modules, "fa3_fwd._C", None)  # as if it were not installed
    with pytest.raises(UnsupportedError, match=f"attention fa3 needs .*{reason}"):
        open_external_attention("fa3", torch.device("cuda"))
    found, why = open_external_attention("auto", torch.device("cuda"))
    assert found is None
    assert "fa3-fwd" in why or "Hopper" in why


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
    device = _device(_flash_attention())
    setting = Setting(MIXES[mix], dtype=torch.bfloat16, geometry=geometry, has_norm=True)
    found = setting.run(device, layer=1)
    torch.testing.assert_close(found.float(), setting.expected(1), rtol=0, atol=0.03)


def test_flash_attention_says_what_it_does_not_take() -> None:
    backend = _flash_attention()
    geometry = AttentionGeometry(4, 2, 64, 1e-6)
    assert backend.refusal(geometry, torch.bfloat16) is None
    assert "not float16" in str(backend.refusal(geometry, torch.float16))
    device = CudaDevice(PLACE, attention="fa3")
    with pytest.raises(UnsupportedError, match="attention fa3 computes bfloat16, not float32"):
        device.check_attention(geometry, torch.float32)
    prompt = np.array([9], dtype=np.int32)
    assert device.num_own_chunks(geometry, torch.float32, prompt, prompt) == 1
    assert device.num_own_chunks(geometry, torch.bfloat16, prompt, prompt) == 0


def kernels(device: CudaDevice, **args: Any) -> GpuKernels:
    """What `serve` reports for a bfloat16 model on `device`."""
    loaded: Any = SimpleNamespace(model=SimpleNamespace(geometry=GEOMETRY), dtype="bfloat16")
    return CudaPlacement(device).gpu_kernels(ServerArgs(**args), loaded)


def test_serve_names_the_attention_that_runs_and_why_not_the_fastest() -> None:
    """A card that computes long prompts without fa3 looked like one that has it."""
    fast = kernels(_device(TorchExternalAttention()))
    assert fast.prompt_attention == TorchExternalAttention.name
    assert fast.faster == ()
    device = _device(None)
    device._why_own_attention = "needs the package fa3-fwd"  # as on a Hopper without it
    slow = kernels(device, disable_cuda_graph=True)
    assert slow.prompt_attention == "triton"
    assert slow.faster == (
        "fa3 for long prompts, which needs the package fa3-fwd",
        "CUDA graphs, which --disable-cuda-graph turns off",
    )
    assert kernels(device, attention_backend="triton").faster == (
        "fa3 for long prompts, which --attention-backend triton turns off",
    )
    assert "--deterministic" in kernels(device, deterministic=True).faster[0]


def test_a_model_that_the_fastest_attention_cannot_compute_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchExternalAttention()
    monkeypatch.setattr(backend, "refusal", lambda *_: "computes bfloat16, not float16", raising=False)
    found = kernels(_device(backend))
    assert found.prompt_attention == "triton"
    assert found.faster == ("fa3 for long prompts, which computes bfloat16, not float16",)
