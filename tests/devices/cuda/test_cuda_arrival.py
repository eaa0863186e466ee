"""Restores that arrive layer by layer: how they are cut, when they are readable, who waits for what."""

import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from headwater.cache.copier import EarlyCopyHandle
from headwater.devices.cuda import arrivals as cuda_arrival
from headwater.devices.cuda.arrivals import Arrival, Arrivals, LayerGroup, layer_groups
from headwater.devices.cuda.host_memory import PinnedHostMemory, register_with_driver
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.cuda.layer_gates import GatedAttention, LayerGates
from headwater.devices.cuda.page_copies import CudaPageCopier
from headwater.devices.kv_memory import KVLayout

pytestmark = [pytest.mark.slow, pytest.mark.gpu]  # torch, and Triton's interpreter
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MIB = 1 << 20
LIMIT_S = 60.0


def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.0005)


@pytest.mark.parametrize(
    ("num_layers", "layer_bytes", "num_pages", "min_piece", "sizes"),
    [
        (32, 64 << 10, 256, 256 << 10, [4] * 8),  # 4,096 tokens at the 8B shape
        (28, 64 << 10, 256, 256 << 10, [4] * 7),
        (32, 64 << 10, 2, 256 << 10, [32]),  # too little to be cut
        (32, 64 << 10, 40, 256 << 10, [16, 16]),
        (28, 512, 32768, 8 << 10, [16, 12]),  # 14-KiB pages: pieces no smaller than a program copies
        (3, 84, 1 << 20, 8, [3]),  # layers that do not begin at a word
    ],
)
def test_groups_hold_every_layer_once_in_pieces_long_enough(num_layers, layer_bytes, num_pages, min_piece, sizes):
    """A layer in no group would be read without waiting; short pieces would miss the link's speed."""
    groups = layer_groups(
        num_layers=num_layers, layer_bytes=layer_bytes, num_pages=num_pages, min_piece_bytes=min_piece
    )
    assert [group.stop - group.first for group in groups] == sizes
    assert [layer for group in groups for layer in range(group.first, group.stop)] == list(range(num_layers))


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize(
    ("layer_mib", "num_early", "num_early_alone"), [(1, 0, 0), (16, 4, 0), (20, 5, 2), (100, 8, 7), (400, 8, 8)]
)
def test_it_is_readable_when_little_enough_is_to_come(monkeypatch, is_alone, layer_mib, num_early, num_early_alone):
    """Too early, and everybody in the step waits for one request's pages; too late, and nothing overlaps."""
    told: list[bool] = []
    monkeypatch.setattr(cuda_arrival.Mark, "wait", lambda self: told.append(arrival.is_readable(is_alone=is_alone)))
    groups = [LayerGroup(first, first + 4) for first in range(0, 32, 4)]
    arrival = Arrival(groups, layer_bytes=layer_mib * MIB, is_gpu=False)
    assert isinstance(arrival, EarlyCopyHandle) and not arrival.is_readable(is_alone=True)
    launched: list[LayerGroup] = []
    arrival.launch(launched.append)
    assert launched == groups, "nothing may be launched, and fail, once it is readable"
    assert not arrival.is_awaited
    arrival.wait()
    needed = num_early_alone if is_alone else num_early
    assert told == [False] * needed + [True] * (num_early - needed)
    assert arrival.is_readable(is_alone=is_alone) and arrival.is_awaited and not arrival.is_done()
    assert arrival.is_readable(is_alone=False), "what was told once stays true: a step may be under way"


def test_a_copy_that_fails_in_the_middle_never_was_readable():
    """Its pages would be in the tree."""
    arrival = Arrival([LayerGroup(0, 2), LayerGroup(2, 3)], layer_bytes=1, is_gpu=False)

    def move(group: LayerGroup) -> None:
        if group.first:
            raise RuntimeError("refused")

    arrival.copy.carry_out(lambda: arrival.launch(move))
    assert arrival.is_done() and arrival.has_failed and not arrival.is_readable(is_alone=True)


def test_a_wait_is_for_the_group_of_its_layer_and_no_later_one():
    told: list[int] = []
    arrival = Arrival([LayerGroup(0, 2), LayerGroup(2, 3)], layer_bytes=1, is_gpu=False)
    for index, mark in enumerate(arrival._marks):
        mark.hold_up = lambda index=index: told.append(index)  # type: ignore[method-assign]
    for layer in range(3):
        arrival.hold_up(layer)
    assert told == [0, 0, 1]


@pytest.fixture
def copier(monkeypatch):
    """Restores cut into single layers; on a card, of 8 MiB each."""
    monkeypatch.setattr(cuda_arrival, "_MIN_GROUP_BYTES", 1)
    monkeypatch.setattr(cuda_arrival, "_MAX_AWAITED_ALONE_BYTES", 1 << 40)
    page_size = 1024 if HAS_GPU else 2
    layout = KVLayout(num_layers=8, num_kv_heads=2, head_dim=128, page_size=page_size, dtype="bfloat16")
    kv = CudaKVMemory(layout, torch.randn(8, *layout.page_shape).to(DEVICE, torch.bfloat16))
    register = register_with_driver if HAS_GPU else lambda address, size: None
    unregister = {} if HAS_GPU else {"unregister": lambda address: None}
    host = PinnedHostMemory(num_pages=8, page_bytes=layout.page_bytes, register=register, **unregister)
    arrivals = Arrivals()
    copier = CudaPageCopier(lambda: kv, host, device=DEVICE, arrivals=arrivals)
    copier._min_piece_bytes = 1
    yield SimpleNamespace(copier=copier, kv=kv, arrivals=arrivals)
    copier.close()
    host.close()


def test_layers_by_themselves_are_the_whole_page(copier):
    before, pages = copier.kv.pages.clone(), np.array([5, 0, 3], np.int32)
    away = copier.copier.offload(pages, np.array([1, 2, 7], np.int32))
    until(away.is_done)
    back = copier.copier.restore(np.array([7, 2, 1], np.int32), np.array([1, 2, 4], np.int32))
    assert len(back.groups) == 8
    until(back.is_done)
    for source, target in ((3, 1), (0, 2), (5, 4)):
        assert torch.equal(copier.kv.pages[target], before[source])
    assert torch.equal(copier.kv.pages[6], before[6]), "a page that was not asked for is untouched"
    assert copier.arrivals.awaited() == []


def test_only_restores_that_are_readable_and_not_done_hold_steps_up(copier):
    """A step that waited for a restore just begun would stand still until the link is free."""
    go_on = threading.Event()
    move = copier.copier._move
    copier.copier._move = lambda *args: (go_on.wait(LIMIT_S), move(*args))
    pages = np.arange(3, dtype=np.int32)
    begun = copier.copier.restore(pages, pages)
    assert not begun.is_readable(is_alone=True) and copier.arrivals.awaited() == []
    go_on.set()
    until(begun.is_done)
    assert copier.arrivals.awaited() == []


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
def test_what_is_launched_behind_a_wait_reads_the_layer_that_arrived(copier):
    """On a card: the last layer is read long before the copy is done, by the clock of the host."""
    kv, pages = copier.kv.pages, np.arange(8, dtype=np.int32)
    expected = kv.clone()
    until(copier.copier.offload(pages, pages).is_done)
    num_early = 0
    for _ in range(20):
        kv.zero_()
        torch.cuda.synchronize()
        arrival = copier.copier.restore(pages, pages)
        until(partial(arrival.is_readable, is_alone=True))
        assert copier.arrivals.awaited() == [arrival] or arrival.is_done()
        num_early += not arrival.is_done()
        found = []
        for layer in range(8):
            arrival.hold_up(layer)
            found.append(kv[:, layer].clone())
        assert torch.equal(torch.stack(found, dim=1), expected)
        until(arrival.is_done)
    assert num_early > 0


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("num_layers", [8, 5])
def test_a_graph_waits_for_what_arrives_when_it_is_launched(copier, num_layers):
    """Captured when nothing arrived; each run waits anew, layer by layer."""
    kv, pages = copier.kv.pages, np.arange(8, dtype=np.int32)
    expected = kv.clone()
    until(copier.copier.offload(pages, pages).is_done)
    found = torch.zeros_like(kv)
    gates = LayerGates(num_layers, device=DEVICE)
    attention = GatedAttention(lambda _, layer, *norms: found[:, layer].copy_(kv[:, layer]), gates)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for layer in range(num_layers):
            attention(found, layer, None, None)
    num_early = 0
    for _ in range(20):
        kv.zero_()
        found.zero_()
        torch.cuda.synchronize()
        arrival = copier.copier.restore(pages, pages)
        until(partial(arrival.is_readable, is_alone=True))
        gates.follow(copier.arrivals.awaited())
        num_early += not arrival.is_done()
        graph.replay()
        assert torch.equal(found[:, :num_layers], expected[:, :num_layers])
        until(arrival.is_done)
    assert num_early > 0
