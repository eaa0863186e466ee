"""Copies of pages between a GPU's KV memory and host memory, each direction on a stream of its own."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cuda_arrival import Arrival, LayerGroup, Mark, layer_groups
from headwater.devices.cuda_host_memory import PinnedHostMemory
from headwater.devices.host_memory import ThreadCopy
from headwater.devices.kv_memory import KVMemory

_log = logging.getLogger(__name__)
Pages = npt.NDArray[np.int32]
Method = Literal["copy_engine", "kernel"]
# From this size on the copy engines reach the link's speed, and take no multiprocessor from the step beside them.
_COPY_ENGINE_PAGE_BYTES = 256 << 10
_KERNEL_PIECE_BYTES = 8 << 10  # what its programs copy at a time


class PageMover(Protocol):
    """One way to copy scattered pages, or the same words of each, on the current stream."""

    def __call__(self, source: torch.Tensor, sources: Pages, target: torch.Tensor, targets: Pages) -> None:
        """target[targets[i]] = source[sources[i]]; both int64[pages, words], one on the device, one on the host.

        Rows need not lie next to each other, but as far apart in both.
        """
        ...


def move_by_copy_engine(source: torch.Tensor, sources: Pages, target: torch.Tensor, targets: Pages) -> None:
    """All pages in one call of the driver. ImportError without NVIDIA's Python bindings."""
    from cuda.bindings import runtime  # type: ignore[import-not-found]  # comes with CUDA builds of PyTorch

    num_bytes, row_bytes = source.shape[1] * source.element_size(), source.stride(0) * source.element_size()
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
    (error, *_) = runtime.cudaMemcpyBatchAsync(
        (target.data_ptr() + targets.astype(np.int64) * row_bytes).tolist(),
        (source.data_ptr() + sources.astype(np.int64) * row_bytes).tolist(),
        [num_bytes] * len(sources),
        len(sources),
        [attributes],
        [0],
        1,
        torch.cuda.current_stream().cuda_stream,
    )
    if int(error) != 0:
        raise RuntimeError(f"the driver refused a copy of {len(sources)} pages: {error}")


def move_by_kernel(source: torch.Tensor, sources: Pages, target: torch.Tensor, targets: Pages) -> None:
    """All pages in one launch of a kernel that reaches into host memory."""
    from headwater.devices.triton_page_copy import copy_pages

    device = source.device if source.is_cuda else target.device
    on_device = torch.from_numpy(np.stack((sources, targets))).to(device)
    copy_pages(source, on_device[0], target, on_device[1])


def choose_mover(page_bytes: int) -> PageMover:
    """The faster way for pages of this size (benchmarks/gpu/page_copies.py)."""
    if page_bytes < _COPY_ENGINE_PAGE_BYTES:
        return move_by_kernel
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found]

        has_batches = hasattr(runtime, "cudaMemcpyBatchAsync")
    except ImportError:
        has_batches = False
    return move_by_copy_engine if has_batches else move_by_kernel


class CudaPageCopier:
    """`cache.copier.PageCopier` between a GPU and registered host memory.

    A thread for each direction launches the copy on its stream and sleeps until it has ended, so the loop neither
    launches nor waits. A copy is seen as done only then. Its source was written by steps that had been collected, and
    offloads are read by the host, so no event orders them and the steps' stream. A restore is readable before: steps
    are held up by `arrivals`.
    """

    def __init__(
        self,
        kv: Callable[[], KVMemory],
        host: PinnedHostMemory,
        *,
        device: torch.device,
        mover: PageMover | None = None,
    ) -> None:
        assert host.page_bytes % 8 == 0, "pages are copied in words of 8 bytes"
        self._kv = kv
        self._host = host
        self._host_words = torch.from_numpy(host.pages).view(torch.int64)
        self._move = mover or choose_mover(host.page_bytes)
        is_kernel = self._move is move_by_kernel
        self._min_piece_bytes = _KERNEL_PIECE_BYTES if is_kernel else _COPY_ENGINE_PAGE_BYTES
        self._is_gpu = device.type == "cuda"
        self._arrivals: list[Arrival] = []
        self._offloads = _CopyThread("offload-pages", device, priority=0)
        self._restores = _CopyThread("restore-pages", device, priority=-1)  # somebody waits for them

    def offload(self, device_pages: Pages, host_pages: Pages) -> ThreadCopy:
        words = self._device_words()

        def job() -> None:
            self._host.wait_ready(host_pages)
            self._move(words, device_pages, self._host_words, host_pages)

        copy = ThreadCopy()
        self._offloads.start(copy, job)
        return copy

    def restore(self, host_pages: Pages, device_pages: Pages) -> Arrival:
        words, layout = self._device_words(), self._kv().layout
        groups = layer_groups(
            num_layers=layout.num_layers,
            layer_bytes=layout.layer_bytes,
            num_pages=len(host_pages),
            min_piece_bytes=self._min_piece_bytes,
        )
        arrival = Arrival(groups, layer_bytes=layout.layer_bytes * len(host_pages), is_gpu=self._is_gpu)

        def move(group: LayerGroup) -> None:
            columns = slice(group.first * layout.layer_bytes // 8, group.stop * layout.layer_bytes // 8)
            self._move(self._host_words[:, columns], host_pages, words[:, columns], device_pages)

        self._restores.start(arrival.copy, lambda: arrival.carry_out(move))
        self._arrivals.append(arrival)
        return arrival

    def arrivals(self) -> list[Arrival]:
        """Restores whose pages may be read and are not all there. To be asked in the thread that begins them."""
        self._arrivals = [arrival for arrival in self._arrivals if not arrival.is_done()]
        return [arrival for arrival in self._arrivals if arrival.is_readable()]

    def close(self) -> None:
        """Carry out what was asked for, and end both threads."""
        self._offloads.close()
        self._restores.close()
        self._host_words = self._host_words[:0].clone()

    def _device_words(self) -> torch.Tensor:
        """The KV memory as int64[pages, words], without a copy. It may have been released and taken again."""
        return self._kv().memory.view(torch.int64)


class _CopyThread:
    """Carries out one copy after another on a stream of its own."""

    def __init__(self, name: str, device: torch.device, *, priority: int) -> None:
        self._device = device
        self._priority = priority
        self._jobs: queue.SimpleQueue[tuple[ThreadCopy, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, copy: ThreadCopy, launch: Callable[[], None]) -> None:
        self._jobs.put((copy, launch))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._device.type != "cuda":
            self._carry_out(Mark(is_gpu=False))
            return
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(priority=self._priority)):
            self._carry_out(Mark(is_gpu=True))

    def _carry_out(self, ended: Mark) -> None:
        while (job := self._jobs.get()) is not None:
            copy, launch = job
            copy.carry_out(lambda launch=launch: _launch_and_wait(launch, ended))


def _launch_and_wait(launch: Callable[[], None], ended: Mark) -> None:
    try:
        launch()
    finally:  # whatever was launched before an error still writes its pages
        ended.record()
        ended.wait()
