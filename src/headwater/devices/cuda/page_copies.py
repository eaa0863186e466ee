"""Copies of pages between a GPU's KV memory and host memory, each direction on a stream of its own."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cpu.host_memory import ThreadCopy
from headwater.devices.cpu.ranks.page_share import PageShare
from headwater.devices.cuda.arrivals import Arrival, Arrivals, LayerGroup, Mark, layer_groups
from headwater.devices.cuda.host_memory import PinnedHostMemory
from headwater.devices.cuda.ranks.head_copies import HeadCopies
from headwater.devices.kv_memory import KVMemory

Pages = npt.NDArray[np.int32]
Method = Literal["copy_engine", "kernel"]
# From this size on, the copy engines reach the link's speed, and take no multiprocessors from concurrent steps.
_COPY_ENGINE_PAGE_BYTES = 256 << 10
_KERNEL_PIECE_BYTES = 8 << 10  # what its programs copy at a time


class PageMover(Protocol):
    """One way to copy scattered pages, or the same words of each, on the current stream."""

    def __call__(self, source: torch.Tensor, sources: Pages, target: torch.Tensor, targets: Pages) -> None:
        """target[targets[i]] = source[sources[i]]; both int64[pages, words], one on the device, one on the host.

        Rows need not be adjacent, but have the same stride in both.
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
    from headwater.devices.cuda.kernels.page_copy import copy_pages

    device = source.device if source.is_cuda else target.device
    lists = torch.empty((2, len(sources)), dtype=torch.int32, pin_memory=device.type == "cuda")
    lists.numpy()[:] = sources, targets
    on_device = lists.to(device, non_blocking=True)  # PyTorch keeps both until the stream is done with them
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

    Each direction has a stream and two threads. They launch the copies and sleep until the copies have ended, so the
    loop neither launches nor waits. A copy is done only then. Steps that wrote its source had been collected, and the
    host reads offloads, so no event orders copies and steps. Restores are readable earlier: steps wait for `arrivals`
    on the device.
    """

    def __init__(
        self,
        kv: Callable[[], KVMemory],
        host: PinnedHostMemory,
        *,
        device: torch.device,
        arrivals: Arrivals,
        mover: PageMover | None = None,
        share: PageShare | None = None,
    ) -> None:
        """Restores are added to `arrivals`, which the steps of the runner must wait for.

        `share`: what this rank has of each page, if it has not all; a kernel copies it.
        """
        assert host.page_bytes % 8 == 0, "pages are copied in words of 8 bytes"
        self._kv = kv
        self._host = host
        self._host_words = torch.from_numpy(host.pages).view(torch.int64)
        self._move = mover or choose_mover(host.page_bytes)
        self._heads = None if share is None else HeadCopies(share, host.pages)
        is_kernel = self._heads is not None or self._move is move_by_kernel
        self._min_piece_bytes = _KERNEL_PIECE_BYTES if is_kernel else _COPY_ENGINE_PAGE_BYTES
        self._is_gpu = device.type == "cuda"
        self._arrivals = arrivals
        self._offloads = _CopyThreads("offload-pages", device, priority=0)
        self._restores = _CopyThreads("restore-pages", device, priority=-1)  # requests wait for them

    def offload(self, device_pages: Pages, host_pages: Pages) -> ThreadCopy:
        memory, words = self._kv().memory, self._device_words()

        def job() -> None:
            self._host.wait_ready(host_pages)
            if self._heads is not None:
                self._heads.offload(memory, device_pages, host_pages)
            else:
                self._move(words, device_pages, self._host_words, host_pages)

        copy = ThreadCopy()
        self._offloads.start(_Job(copy, job))
        return copy

    def restore(self, host_pages: Pages, device_pages: Pages) -> Arrival:
        memory, words, layout = self._kv().memory, self._device_words(), self._kv().layout
        groups = layer_groups(
            num_layers=layout.num_layers,
            layer_bytes=layout.layer_bytes,
            num_pages=len(host_pages),
            min_piece_bytes=self._min_piece_bytes,
        )
        arrival = Arrival(groups, layer_bytes=layout.layer_bytes * len(host_pages), is_gpu=self._is_gpu)

        def move(group: LayerGroup) -> None:
            if self._heads is not None:
                self._heads.restore(host_pages, memory, device_pages, layers=slice(group.first, group.stop))
                return
            columns = slice(group.first * layout.layer_bytes // 8, group.stop * layout.layer_bytes // 8)
            self._move(self._host_words[:, columns], host_pages, words[:, columns], device_pages)

        self._restores.start(_Job(arrival.copy, lambda: arrival.launch(move), arrival.wait))
        self._arrivals.add(arrival)
        return arrival

    def close(self) -> None:
        """Finish the copies that were started, and end the threads."""
        self._offloads.close()
        self._restores.close()
        self._host_words, self._heads = self._host_words[:0].clone(), None

    def _device_words(self) -> torch.Tensor:
        """The KV memory, which may have been released and allocated again, as int64[pages, words]."""
        return self._kv().memory.view(torch.int64)


@dataclass(frozen=True, slots=True)
class _Job:
    """A copy. `launch` enqueues it on the current stream; `wait` runs in the other thread, before the copy ends."""

    copy: ThreadCopy
    launch: Callable[[], None]
    wait: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class _Launched:
    job: _Job
    began_s: float
    ended: Mark
    error: Exception | None


class _CopyThreads:
    """Runs one copy after another on a stream of its own: one thread launches them, the other waits for their ends."""

    def __init__(self, name: str, device: torch.device, *, priority: int) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        with torch.cuda.device(device) if self._is_gpu else nullcontext():
            self._stream = torch.cuda.Stream(priority=priority) if self._is_gpu else None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[_Launched | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._on_stream, args=(body,), name=name, daemon=True)
            for body in (self._launch, self._end)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, job: _Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Finish the copies that were started, and end both threads."""
        self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _on_stream(self, body: Callable[[], None]) -> None:
        if self._stream is None:
            body()
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            body()

    def _launch(self) -> None:
        while (job := self._jobs.get()) is not None:
            began_s, error = time.perf_counter(), None
            try:
                job.launch()
            except Exception as found:  # noqa: BLE001  this copy is lost, the thread has others to carry out
                error = found
            ended = Mark(is_gpu=self._is_gpu)
            ended.record()  # after an error as well: what was launched before it still writes its pages
            self._launched.put(_Launched(job, began_s, ended, error))
        self._launched.put(None)

    def _end(self) -> None:
        last_s = 0.0
        while (launched := self._launched.get()) is not None:
            error = launched.error
            try:
                if error is None:
                    launched.job.wait()
                launched.ended.wait()
            except Exception as found:  # noqa: BLE001
                error = found
            now_s = time.perf_counter()
            launched.job.copy.end(took_s=now_s - max(last_s, launched.began_s), error=error)
            last_s = now_s
