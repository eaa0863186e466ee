"""Which graphs are captured, and that whoever waits hears of each. What a graph computes is tested on a GPU."""

import pytest

torch = pytest.importorskip("torch")

from headwater.execution.step_graphs import StepGraphs  # noqa: E402

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
    return order


def test_each_graph_is_captured_once_the_largest_first_and_reported(captured: list[int]) -> None:
    graphs = StepGraphs(torch.zeros, lambda shape: None, shapes=(1, 2, 4), pool=object())
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
