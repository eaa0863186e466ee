"""LoRA kernels against the definition in PyTorch. Without a card Triton interprets them."""

import pytest
import torch
import torch.nn.functional as F

from headwater.devices.adapters import Adapter, AdapterShape, random_adapter
from headwater.devices.cuda.adapters import CudaAdapters
from headwater.devices.cuda.kernels.row_tiles import UNSLOTTED, plan_tiles
from headwater.devices.cuda.products.gated_linear import CudaGatedLinear
from headwater.devices.cuda.products.linear import CudaLinear
from interpreted_triton import exact_dots

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
IS_GPU = torch.cuda.is_available()
PLACE = torch.device("cuda" if IS_GPU else "cpu")
SITES = {"qkv": (96, (80, 24, 24)), "o": (300, (130,)), "gate_up": (40, (1040, 1040)), "down": (1040, (40,))}
RANKS = (40, 5, 16)  # of the slots from 1
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}  # gate and up are rounded in float16


@pytest.fixture(autouse=True)
def _exact_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IS_GPU:
        exact_dots(monkeypatch)


def memory_of(max_rank: int, dtype: torch.dtype) -> tuple[CudaAdapters, list[Adapter]]:
    form = str(dtype).removeprefix("torch.")
    shape = AdapterShape(num_layers=1, num_slots=5, max_rank=max_rank, sites=SITES)
    memory = CudaAdapters(shape, form=form, device=PLACE)
    adapters = [
        random_adapter(shape, rank=min(rank, max_rank), seed=slot, form=form, scale=30.0)
        for slot, rank in enumerate(RANKS, 1)
    ]
    del adapters[1].matrices[0, "up"], adapters[1].matrices[0, "k"]  # type: ignore[attr-defined]
    for slot, adapter in enumerate(adapters, 1):
        memory.place(slot, memory.prepare(adapter))
    return memory, adapters


def added(adapters: list[Adapter], site: str, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    sizes = SITES[site][1]
    y = torch.zeros(len(x), sum(sizes), device=PLACE)
    for slot, adapter in enumerate(adapters, 1):
        own = slots == slot
        for index, each in adapter.at(0, site):
            a, b = (torch.from_numpy(it.to_float32()).to(PLACE) for it in (each.a, each.b))
            first = sum(sizes[:index])
            y[own, first : first + len(b)] = each.scale * (x[own].float() @ a.T) @ b.T
    return y


def slots_of(num_rows: int) -> torch.Tensor:
    """No adapter, then those of the slots 1, 2, 3 in turn: slot 4 is empty."""
    return torch.arange(num_rows, dtype=torch.int32, device=PLACE) % 4


@pytest.mark.parametrize("num_rows", [1, 40, 260])
def test_rows_get_what_their_adapter_adds(num_rows: int) -> None:
    """A part of the inputs left out, a rank behind the sixteenth, another row's adapter: each changes numbers."""
    memory, adapters = memory_of(40, torch.float32)
    slots = slots_of(num_rows) if num_rows > 1 else torch.ones(1, dtype=torch.int32, device=PLACE)
    step = memory.of_step(slots)
    for site in SITES if num_rows < 100 else ("down",):  # the interpreter takes its time
        num_in, sizes = SITES[site]
        x, before = torch.randn(num_rows, num_in, device=PLACE), torch.randn(num_rows, sum(sizes), device=PLACE)
        y = before.clone()
        step.add(site, 0, x, y)
        torch.testing.assert_close(y, before + added(adapters, site, x, slots), rtol=2e-5, atol=2e-5)
        assert torch.equal(y[slots == 0], before[slots == 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gate_and_up_are_multiplied_with_their_adapters(dtype: torch.dtype) -> None:
    """A row without an adapter is multiplied too."""
    memory, adapters = memory_of(16, dtype)
    num_in, (num_out, _) = SITES["gate_up"]
    linear = CudaGatedLinear(CudaLinear([torch.randn(num_out, num_in, device=PLACE).to(dtype) / 6 for _ in range(2)]))
    slots = slots_of(23)
    x, step = torch.randn(23, num_in, device=PLACE).to(dtype), memory.of_step(slots)
    y = step.gated(0, linear, x)
    halves = linear.halves(x).float() + added(adapters, "gate_up", x, slots)
    expected = F.silu(halves[:, :num_out]) * halves[:, num_out:]
    torch.testing.assert_close(y.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    residual = torch.zeros(23, SITES["down"][1][0], device=PLACE)
    step.add("down", 0, y, residual)
    torch.testing.assert_close(residual, added(adapters, "down", y, slots), rtol=2e-4, atol=2e-4)


def test_tiles_cover_rows_without_a_slot_only_when_told_to() -> None:
    slots = torch.tensor([0, 2, 0, 2, 1], dtype=torch.int32, device=PLACE)
    for covers_all in (False, True):
        tiles = plan_tiles(slots, num_slots=4, size=16, covers_all=covers_all)
        found = {
            int(slot): rows[rows >= 0].tolist() for slot, rows in zip(tiles.slots, tiles.rows, strict=True) if slot
        }
        assert found == {1: [4], 2: [1, 3]} | ({UNSLOTTED: [0, 2]} if covers_all else {})
