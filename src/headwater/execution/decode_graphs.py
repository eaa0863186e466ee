"""CUDA graphs of whole decode steps, one per padded batch size (https://arxiv.org/abs/2006.02204 shows why).

A small model's decode step is hundreds of kernels of a few microseconds, which Python cannot launch as fast as the
card runs them; a graph launches them all at once.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch

_log = logging.getLogger(__name__)


def graph_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes to capture, up to `largest` at least: close together where padding would cost most."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, max(largest, 144) + 16, 16)]
    fitting = [size for size in sizes if size < largest]
    return (*fitting, largest) if largest > 0 else ()


class DecodeGraphs:
    """Graphs of `compute`, captured when first needed or ahead of time, all in one pool of memory.

    `compute(size)` enqueues a step of `size` rows on static inputs and returns its logits; `idle()` makes the static
    inputs those of a step that touches nothing, and is called before a capture.
    """

    def __init__(
        self, compute: Callable[[int], torch.Tensor], idle: Callable[[], None], *, sizes: Sequence[int]
    ) -> None:
        self._compute = compute
        self._idle = idle
        self._sizes = tuple(sizes)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if sizes else None

    def padded(self, num_rows: int) -> int:
        """The size that `run` wants for a step of `num_rows` rows: the next captured one, or as it is."""
        return next((size for size in self._sizes if size >= num_rows), num_rows)

    def prepare(self, size: int) -> None:
        """Capture the graph of a padded size, unless it is there. Overwrites the static inputs."""
        if size in self._sizes and size not in self._graphs:
            self._idle()
            self._capture(size)

    def run(self, size: int) -> torch.Tensor:
        """Enqueue a step of a padded size; returns its logits, valid until the next step."""
        if size not in self._graphs:
            return self._compute(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def capture_all(self) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        started_s = time.monotonic()
        for size in reversed(self._sizes):
            self.prepare(size)
        if self._sizes:
            seconds = time.monotonic() - started_s
            _log.info("captured CUDA graphs of %d decode batches in %.1f s", len(self._sizes), seconds)

    def clear(self) -> None:
        """Forget all graphs: what they read has moved. They are captured again when needed."""
        self._graphs.clear()

    def _capture(self, size: int) -> None:
        self._compute(size)  # compiles and initialises what a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (copies, new weights) may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._compute(size)
        self._graphs[size] = (graph, logits)
