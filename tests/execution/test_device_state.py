"""What a GPU's runner keeps between steps, on the CPU: staging, page tables by their changes, sizes of graphs."""

import itertools

import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from headwater.execution.device_slots import DeviceSlots  # noqa: E402
from headwater.execution.staging import StagingRing  # noqa: E402
from headwater.execution.step_graphs import StepGraphs, graph_sizes, next_size  # noqa: E402
from headwater.scheduling.plan import PageUpdate, StepPlan  # noqa: E402

CPU = torch.device("cpu")


def _plan(*updates: PageUpdate) -> StepPlan:
    nothing = np.zeros(0, dtype=np.int32)
    return StepPlan(
        step_id=0,
        assignments=(),
        page_updates=updates,
        slots=nothing,
        uses=nothing.astype(np.int64),
        num_computed=nothing,
        num_tokens=nothing,
        samples=nothing.astype(np.bool_),
        token_ids=nothing,
        num_decodes=0,
        num_outputs=nothing,
    )


def _update(slot: int, first: int, *pages: int) -> PageUpdate:
    return PageUpdate(slot, first, np.array(pages, dtype=np.int32))


def test_only_changed_entries_of_page_tables_are_written_and_the_later_change_wins() -> None:
    """A plan may give a slot its table, replace a part of it by shared pages, and extend it, in this order."""
    slots = DeviceSlots(CPU, max_running=3, max_pages=6)
    slots.apply(_plan(_update(0, 0, 9, 8, 7), _update(2, 0, 1, 2, 3), _update(2, 1, 5), _update(2, 3, 4)))
    assert slots.tables[0].tolist() == [9, 8, 7, 0, 0, 0]
    assert slots.tables[1].tolist() == [0] * 6
    assert slots.tables[2].tolist() == [1, 5, 3, 4, 0, 0]
    slots.apply(_plan(_update(0, 2, 6)))
    assert slots.tables[0].tolist() == [9, 8, 6, 0, 0, 0]
    with pytest.raises(AssertionError, match="page table too short"):
        slots.apply(_plan(_update(1, 5, 1, 2)))


def test_staged_arrays_arrive_aligned_at_an_address_that_stays() -> None:
    """CUDA graphs have recorded the address; kernels are compiled for its alignment."""
    ring = StagingRing(CPU, num_ints=256)
    address = ring.on_device.data_ptr()
    for step in range(5):
        arrays = [np.arange(n, dtype=np.int32) + step for n in (3, 0, 17)] + [np.full((2, 5), step, dtype=np.int32)]
        staged = ring.stage(arrays)
        for tensor, array in zip(staged, arrays, strict=True):
            assert np.array_equal(tensor.numpy(), array)
            assert (tensor.data_ptr() - address) % 64 == 0
    assert ring.on_device.data_ptr() == address
    (long,) = ring.stage([np.arange(1000, dtype=np.int32)])  # more than it was made for
    assert long.tolist() == list(range(1000))


def test_graphs_are_as_large_as_the_largest_batch_and_close_together() -> None:
    """Padding to a far larger batch would cost what the graph saves."""
    assert graph_sizes(0) == ()
    assert graph_sizes(1) == (1,)
    assert graph_sizes(5) == (1, 2, 4, 5)
    sizes = graph_sizes(256)
    assert sizes[-1] == 256 and sizes == tuple(sorted(set(sizes)))
    assert all(after <= max(2 * before, before + 16) for before, after in itertools.pairwise(sizes))


def test_a_batch_beyond_the_graphs_runs_as_it_is() -> None:
    ran: list[int] = []
    graphs = StepGraphs(lambda size: ran.append(size) or torch.zeros(size), ran.append, shapes=(), pool=object())
    assert next_size((1, 4, 16), 17) is None and next_size((1, 4, 16), 5) == 16 and next_size((), 1) is None
    graphs.prepare(37)
    assert len(graphs.run(37)) == 37
    assert ran == [37]


def test_cleared_graphs_are_captured_anew_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they had recorded, weights or KV memory, lies elsewhere."""
    told: list[str] = []
    graphs = StepGraphs(
        lambda size: torch.zeros(size), lambda size: told.append(f"idle {size}"), shapes=(4, 8), pool=object()
    )

    def capture(size: int) -> None:
        told.append(f"capture {size}")
        graphs._graphs[size] = None  # type: ignore[assignment]

    monkeypatch.setattr(graphs, "_capture", capture)
    for _ in range(2):
        graphs.prepare(8)
        graphs.prepare(8)
        graphs.prepare(5)
        graphs.clear()
    assert told == ["idle 8", "capture 8"] * 2
