"""The benchmark of the control path: events counted twice, or a gap taken for a kernel, would give a wrong figure."""

import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def control_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "serving"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import control_path

    yield control_path
    for name in ("results", "load_client", "workloads"):  # general names, not for other tests to find
        sys.modules.pop(name, None)


@pytest.mark.parametrize("seed", range(20))
def test_events_are_counted_once_however_they_arrive(control_path: ModuleType, seed: int) -> None:
    from control_path_parts.streams import Stream

    dice = random.Random(seed)
    events = b'5\r\ndata: {"a": 1}\n\n\r\n' * 7 + b'data: {"b": 2}\n\ndata: {"c": "data: {"}\n\n'
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + events + b"data: [DONE]\n\n"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Stream(ours)
        while answer:
            num_bytes = dice.choice((1, 2, 7, 30))
            theirs.sendall(answer[:num_bytes])
            answer = answer[num_bytes:]
            stream.read()
            assert stream.has_ended == (len(answer) <= 2)
    assert len(stream.came_ns) == 9


def test_time_between_kernels_counts_without_the_ops_of_sampling(control_path: ModuleType) -> None:
    """Steps of 10 us, 3 us apart; in each gap the engine's thread computes 2 us, and an op of sampling takes 1 us."""
    calls = []
    for step in range(20):
        began = 1 + step * 14_000
        cpu = step * 13_000
        calls.append((2, began, began + 10_000, cpu, cpu + 10_000))
        calls.append((0, began + 11_000, began + 12_000, cpu + 11_000, cpu + 12_000))
    ended_ns = 20 * 14_000
    came_ns = tuple(1 + step * 14_000 + 10_000 + 500 for step in range(20))
    cpu_ns = {"api": 400_000, "engine_io": 100_000}
    window = control_path.Window(0, ended_ns, {"api": 0, "engine_io": 0}, cpu_ns, came_ns)
    found = control_path.figures(window, np.array(calls), num_streams=2)
    assert found["kernels_us_step"] == 10.0
    assert found["engine_gap_us_step"] == 3.0
    assert found["engine_cpu_us_step"] == 2.0
    assert found["engine_io_us_step"] == 5.0
    assert found["api_cpu_us_token"] == 10.0
    assert found["control_us_token"] == (2.0 + 5.0) / 2 + 10.0
    assert found["delivery_us"] == 0.5
