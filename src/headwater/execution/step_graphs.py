"""CUDA graphs of whole steps, one per padded shape (https://arxiv.org/abs/2006.02204 shows why).

A small step is hundreds of kernels of a few microseconds. The card runs them faster than Python launches them; a graph
launches them all at once.
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
    """Batch sizes of decodes to capture, up to `largest` at least: close together where padding costs most."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, max(largest, 144) + 16, 16)]
    fitting = [size for size in sizes if size < largest]
    return (*fitting, largest) if largest > 0 else ()


def next_size(sizes: Sequence[int], num: int) -> int | None:
    """The smallest of the ascending `sizes` that `num` fits in."""
    return next((size for size in sizes if size >= num), None)


@contextmanager
def without_collection() -> Iterator[None]:
    """Disable Python's garbage collector: freeing a graph during a capture invalidates the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphPool:
    """Memory that graphs share.

    PyTorch refuses a capture into a pool whose graphs are all gone while tensors in it are alive. So a pool is renewed
    whenever all its graphs are dropped.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    def renew(self) -> None:
        """Graphs captured from now on share new memory. The old memory is freed with the last tensor in it."""
        self.handle = torch.cuda.graph_pool_handle()


class StepGraphs(Generic[Shape]):
    """Graphs of `compute`, captured when first needed or ahead of time.

    `compute(shape)` enqueues a step of a shape on static inputs and returns its output. `idle(shape)` sets the static
    inputs to a step that does nothing, and is called before a capture. Graphs of one `pool` share their memory: an
    output is valid until the next run of any of them. Without a pool, as on a CPU, nothing is captured, and every step
    is computed kernel by kernel.
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
        """Capture the graph of a shape that needs one and has none. Overwrites the static inputs."""
        if self._pool is not None and shape in self._shapes and shape not in self._graphs:
            self._idle(shape)
            self._capture(shape)

    def run(self, shape: Shape) -> torch.Tensor:
        """Enqueue a step of a shape; returns its output, valid until the next step."""
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
        """Drop all graphs, because their inputs have moved. They are captured again when needed, in a renewed pool."""
        self._graphs.clear()

    def _capture(self, shape: Shape) -> None:
        self._compute(shape)  # compiles and initialises kernels, which a capture must not
        torch.cuda.synchronize()
        assert self._pool is not None
        graph = torch.cuda.CUDAGraph()
        # Other threads (copies, new weights) may go on calling CUDA meanwhile.
        with without_collection(), torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode="thread_local"):
            output = self._compute(shape)
        self._graphs[shape] = (graph, output)
