"""CUDA graphs of whole steps, one per padded shape (https://arxiv.org/abs/2006.02204 shows why).

A small step is hundreds of kernels of a few microseconds, which Python cannot launch as fast as the card runs them; a
graph launches them all at once.
"""

import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

_log = logging.getLogger(__name__)
_MIB = 1 << 20

Shape = TypeVar("Shape", bound=Hashable)


def graph_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes of decodes to capture, up to `largest` at least: close together where padding would cost most."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, max(largest, 144) + 16, 16)]
    fitting = [size for size in sizes if size < largest]
    return (*fitting, largest) if largest > 0 else ()


def next_size(sizes: Sequence[int], num: int) -> int | None:
    """The smallest of the ascending `sizes` that `num` fits in."""
    return next((size for size in sizes if size >= num), None)


@contextmanager
def without_collection() -> Iterator[None]:
    """Python's collector stays away: a graph that it freed in the midst of a capture would spoil that."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphPool:
    """Memory that graphs share.

    PyTorch refuses a capture into a pool whose graphs are all gone while something in it is still referred to, so
    whoever forgets all graphs renews it.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    def renew(self) -> None:
        """Graphs captured from now on share other memory. The old memory goes with the last that refers to it."""
        self.handle = torch.cuda.graph_pool_handle()


class StepGraphs(Generic[Shape]):
    """Graphs of `compute`, captured when first needed or ahead of time.

    `compute(shape)` enqueues a step of a shape on static inputs and returns what the step leaves behind; `idle(shape)`
    makes the static inputs those of a step that touches nothing, and is called before a capture. Graphs of one `pool`
    share their memory: what a run returned is valid until the next run of any of them. Without a pool, as on a CPU,
    nothing is captured and every step is computed as it is.
    """

    def __init__(
        self,
        compute: Callable[[Shape], torch.Tensor],
        idle: Callable[[Shape], None],
        *,
        shapes: Sequence[Shape],
        pool: GraphPool | None = None,
    ) -> None:
        self._compute = compute
        self._idle = idle
        self._shapes = tuple(shapes)
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = pool

    def prepare(self, shape: Shape) -> None:
        """Capture the graph of a shape that is to have one, unless it is there. Overwrites the static inputs."""
        if self._pool is not None and shape in self._shapes and shape not in self._graphs:
            self._idle(shape)
            self._capture(shape)

    def run(self, shape: Shape) -> torch.Tensor:
        """Enqueue a step of a shape; returns what it leaves behind, valid until the next step."""
        if shape not in self._graphs:
            return self._compute(shape)
        graph, output = self._graphs[shape]
        graph.replay()
        return output

    @property
    def num_missing(self) -> int:
        """Graphs that `capture_all` would capture now."""
        return 0 if self._pool is None else len(self._shapes) - len(self._graphs)

    def capture_all(self, what: str, captured: Callable[[], None] = lambda: None) -> None:
        """Capture every shape, the last and largest first, so that the others fit into its memory.

        `captured` is called after each.
        """
        if self._pool is None or not self._shapes:
            return
        started_s, free_bytes = time.monotonic(), torch.cuda.mem_get_info()[0]
        for shape in reversed(self._shapes):
            if shape not in self._graphs:
                self.prepare(shape)
                captured()
        seconds, taken_bytes = time.monotonic() - started_s, free_bytes - torch.cuda.mem_get_info()[0]
        _log.info(
            "captured CUDA graphs of %d %s in %.1f s, %d MiB", len(self._shapes), what, seconds, taken_bytes // _MIB
        )

    def clear(self) -> None:
        """Forget all graphs: what they read has moved. They are captured again when needed, into a renewed pool."""
        self._graphs.clear()

    def _capture(self, shape: Shape) -> None:
        self._compute(shape)  # compiles and initialises what a capture may not
        torch.cuda.synchronize()
        assert self._pool is not None
        graph = torch.cuda.CUDAGraph()
        # Other threads (copies, new weights) may go on calling CUDA meanwhile.
        with without_collection(), torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode="thread_local"):
            output = self._compute(shape)
        self._graphs[shape] = (graph, output)
