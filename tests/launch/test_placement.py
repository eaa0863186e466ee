"""Where the model computes and how much KV fits there, in words for the user when it does not."""

import dataclasses
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from headwater.devices.cpu import device as cpu_device  # noqa: E402
from headwater.devices.errors import UnsupportedError  # noqa: E402
from headwater.devices.kv_memory import KVLayout  # noqa: E402
from headwater.launch.config import ServerArgs  # noqa: E402
from headwater.launch.placement import flags_in_errors, num_kv_pages, open_placement  # noqa: E402

GIB = 1 << 30
LAYOUT = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16")  # 2 MiB a page


def test_kv_gets_what_weights_and_steps_leave_of_the_share() -> None:
    args = ServerArgs(mem_fraction_static=0.5)
    sizes = {"weights_bytes": 16 * GIB, "free_bytes": 64 * GIB, "reserved_bytes": 4 * GIB}
    num_pages = num_kv_pages(args, LAYOUT, max_context=4096, **sizes)
    assert num_pages == (40 - 16 - 4) * GIB // LAYOUT.page_bytes


def test_a_model_that_does_not_fit_is_told_with_the_numbers() -> None:
    args = ServerArgs(mem_fraction_static=0.5)
    told = r"weights take 16\.00 GiB, steps need 4\.00 GiB, 20\.00 GiB of memory are free"
    sizes = {"weights_bytes": 16 * GIB, "free_bytes": 20 * GIB, "reserved_bytes": 4 * GIB}
    with pytest.raises(ValueError, match=told):
        num_kv_pages(args, LAYOUT, max_context=4096, **sizes)


def test_sizes_in_tokens_win_and_hold_a_page_at_least() -> None:
    assert num_kv_pages(ServerArgs(max_total_tokens=100), LAYOUT, max_context=4096, weights_bytes=0, free_bytes=0) == 6
    with pytest.raises(ValueError, match="max-total-tokens"):
        num_kv_pages(ServerArgs(max_total_tokens=10), LAYOUT, max_context=4096, weights_bytes=0, free_bytes=0)


def test_a_cpu_holds_352_mib_of_kv_or_one_long_conversation_with_a_large_model() -> None:
    """640 MiB were most of a small model's memory; for a model of 8B, 352 MiB would hold 2,816 tokens."""
    args = ServerArgs().for_device("cpu")
    small = dataclasses.replace(LAYOUT, num_layers=4)
    for layout, max_context, num_tokens in (
        (small, 2048, 352 * 16 * 4),
        (LAYOUT, 131_072, 8192),
        (LAYOUT, 5000, 5008),
        (LAYOUT, 1000, 352 // 2 * 16),
    ):
        num_pages = num_kv_pages(args, layout, max_context=max_context, weights_bytes=0, free_bytes=0)
        assert num_pages * layout.page_size == num_tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--device cuda needs an NVIDIA GPU"):
        open_placement(ServerArgs(device="cuda"))
    with pytest.raises(ValueError, match="--attention-backend triton needs --device cuda"):
        open_placement(ServerArgs(attention_backend="triton"))
    before = torch.get_num_threads()
    assert open_placement(ServerArgs()).device.name == "cpu"
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("refused", "shown"),
    [
        (("device", "cuda", "needs a GPU"), "--device cuda needs a GPU"),
        (("attention", "fa3", "computes bfloat16"), "--attention-backend fa3 computes bfloat16"),
        (
            ("kv_dtype", "float8_e4m3fn", "needs 8.9"),
            "--kv-cache-dtype fp8_e4m3 needs 8.9: take auto or fp8_e5m2",
        ),
    ],
)
def test_what_a_device_refuses_is_reported_by_its_flag(refused: tuple[str, str, str], shown: str) -> None:
    """Users know no parameters of ours, and not PyTorch's names of dtypes."""
    with pytest.raises(ValueError) as found, flags_in_errors():
        raise UnsupportedError(*refused)
    assert str(found.value) == shown


@pytest.mark.parametrize(("more", "flag"), [({"tp_size": 2}, "--tp-size"), ({"enable_lora": True}, "--enable-lora")])
def test_what_cannot_be_deterministic_on_a_gpu_is_refused_by_its_flag(more: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=f"--deterministic does not go with {flag}"):
        open_placement(ServerArgs(device="cuda", deterministic=True, **more))


def test_a_cpu_is_deterministic_with_kernels_and_without_amx_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ServerArgs(device="cpu", deterministic=True)
    monkeypatch.setattr(cpu_device, "usable_kernels", lambda: object())
    for has_tiles in (False, True):
        monkeypatch.setattr(cpu_device, "has_tiles", lambda library, found=has_tiles: found)
        if not has_tiles:
            assert open_placement(asked).device.name == "cpu"
            continue
        with pytest.raises(ValueError, match="--deterministic does not go with AMX"):
            open_placement(asked)
    monkeypatch.setattr(cpu_device, "usable_kernels", lambda: None)
    with pytest.raises(ValueError, match="--deterministic needs the compiled kernels"):
        open_placement(asked)
    assert open_placement(ServerArgs(device="cpu")).device.name == "cpu"


def test_a_gpu_without_its_libraries_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("headwater.devices.cuda.", "headwater.launch.cuda"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"--device cuda .* triton is not installed: pip install 'headwater\[gpu\]'"):
        open_placement(ServerArgs(device="cuda"))
