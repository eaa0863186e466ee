"""Which graphs are captured, and that whoever waits hears of each. What a graph computes is tested on a GPU."""

import contextlib
import gc

import pytest

torch = pytest.importorskip("torch")

from headwater.execution.step_graphs import GraphPool, StepGraphs, without_collection  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shapes that were captured, in order; stands for the card."""
    order: list[int] = []

    def capture(self: StepGraphs[int], shape: int) -> None:
        order.append(shape)
        self._graphs[shape] = (None, torch.zeros(shape))  # type: ignore[assignment]

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return order


def test_each_graph_is_captured_once_the_largest_first_and_reported(captured: list[int]) -> None:
    graphs = StepGraphs(torch.zeros, lambda shape: None, shapes=(1, 2, 4), pool=GraphPool())
    graphs.prepare(2)
    assert graphs.num_missing == 2
    reported: list[int] = []
    graphs.capture_all("decodes", lambda: reported.append(len(captured)))
    assert captured == [2, 4, 1]
    assert reported == [2, 3]
    graphs.capture_all("decodes", lambda: reported.append(0))
    assert (captured, reported, graphs.num_missing) == ([2, 4, 1], [2, 3], 0)
    graphs.clear()
    assert graphs.num_missing == 3


def test_without_a_pool_nothing_is_captured(captured: list[int]) -> None:
    graphs = StepGraphs(torch.zeros, lambda shape: None, shapes=(1, 2))
    graphs.capture_all("decodes")
    assert (captured, graphs.num_missing) == ([], 0)
    assert graphs.run(2).shape == (2,)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_stays_away_and_is_as_it_was_afterwards(is_enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        with contextlib.suppress(ZeroDivisionError), without_collection():
            assert not gc.isenabled()
            _ = 1 / 0
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_graph_that_becomes_garbage_does_not_spoil_a_capture() -> None:
    """An engine that has ended keeps its graphs until the collector comes, which may be while another captures."""
    x = torch.zeros(8, device="cuda")
    old = StepGraphs(lambda shape: x + shape, lambda shape: None, shapes=(1,), pool=GraphPool())
    old.capture_all("old")
    left = [old]
    del old

    def compute(shape: int) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            ring: list[object] = [left.pop()]
            ring.append(ring)
            del ring
            _ = [[] for _ in range(100_000)]  # enough for the collector to come
        return x * shape

    graphs = StepGraphs(compute, lambda shape: None, shapes=(3,), pool=GraphPool())
    graphs.capture_all("new")
    x.fill_(2.0)
    assert graphs.run(3).tolist() == [6.0] * 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_are_captured_again_while_what_the_old_ones_left_is_in_use() -> None:
    """As after new weights: PyTorch would not share the old memory, of which somebody still holds a part."""
    x, pool = torch.zeros(8, device="cuda"), GraphPool()
    graphs = StepGraphs(lambda shape: x + shape, lambda shape: None, shapes=(1,), pool=pool)
    graphs.capture_all("old")
    left = graphs.run(1)
    graphs.clear()
    pool.renew()
    graphs.capture_all("new")
    x.fill_(2.0)
    assert graphs.run(1).tolist() == [3.0] * 8
    assert left.shape == x.shape
