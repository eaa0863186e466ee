"""Host memory for pages, and the CPU device's copies between it and the KV memory."""

import itertools
import logging
import mmap
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.ranks.page_share import PageShare
from headwater.devices.kv_memory import KVMemory

_log = logging.getLogger(__name__)
Pages = npt.NDArray[np.int32]
Parts = Sequence[npt.NDArray[np.uint8]]  # each [pages, ...]


class HostMemory:
    """`num_pages` pages of `page_bytes` bytes, page-first: all layers of a page are one contiguous run.

    Memory is allocated on first write. `buffer`: memory that other processes share, if they do.
    """

    def __init__(self, *, num_pages: int, page_bytes: int, buffer: mmap.mmap | None = None) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        shape = (num_pages, page_bytes)
        self.pages: npt.NDArray[np.uint8] = (
            np.zeros(shape, dtype=np.uint8)
            if buffer is None
            else np.frombuffer(buffer, dtype=np.uint8, count=num_pages * page_bytes).reshape(shape)
        )

    def view(self, page: int) -> memoryview:
        """A writable view of one page."""
        return memoryview(self.pages[page])

    @property
    def num_ready_pages(self) -> int:
        """All of them: nothing has to be pinned."""
        return self.num_pages

    def close(self) -> None:
        """Nothing to do: the memory is freed with the last view of it."""


class ThreadCopy:
    """A copy (`cache.copier.CopyHandle`) that a thread carries out."""

    def __init__(self) -> None:
        self.has_failed = False
        self.took_s = 0.0
        self._done = threading.Event()

    def is_done(self) -> bool:
        return self._done.is_set()

    def carry_out(self, job: Callable[[], None]) -> None:
        """Called in the thread: do the work and measure it, because the loop may ask for the result much later."""
        started_s, error = time.perf_counter(), None
        try:
            job()
        except Exception as found:  # noqa: BLE001  this copy is lost, the thread has others to carry out
            error = found
        self.end(took_s=time.perf_counter() - started_s, error=error)

    def end(self, *, took_s: float, error: Exception | None = None) -> None:
        """Called in the thread: the copy no longer reads its source or writes its destination."""
        if error is not None:
            _log.error("a copy of pages failed", exc_info=error)
            self.has_failed = True
        self.took_s = took_s
        self._done.set()


class CpuPageCopier:
    """`cache.copier.PageCopier` between CPU KV memory and host memory: one thread, large copies.

    Restores go first, because requests wait for them. `kv` is called for each copy: the KV memory may be released
    and allocated again. `share`: what this rank has of each page, if it has not all.
    """

    def __init__(self, kv: Callable[[], KVMemory], host: HostMemory, *, share: PageShare | None = None) -> None:
        self._kv = kv
        self._share = share
        self._host: Parts = [host.pages] if share is None else share.of_whole(host.pages)
        self._jobs: queue.PriorityQueue[tuple[int, int, ThreadCopy | None, Callable[[], None]]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._run, name="copy-pages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish the copies that were started, and end the thread."""
        self._jobs.put((2, next(self._order), None, lambda: None))
        self._thread.join()

    def offload(self, device_pages: Pages, host_pages: Pages) -> ThreadCopy:
        device = self._device()
        if self._share is not None and not self._share.is_writer:
            return self._start(lambda: None, rank=1)
        return self._start(lambda: _copy(device, device_pages, self._host, host_pages), rank=1)

    def restore(self, host_pages: Pages, device_pages: Pages) -> ThreadCopy:
        device = self._device()
        return self._start(lambda: _copy(self._host, host_pages, device, device_pages), rank=0)

    def _device(self) -> Parts:
        """The KV memory, in the parts that it has in host memory, without a copy."""
        memory = self._kv().memory
        return [memory] if self._share is None else self._share.of_own(memory)

    def _start(self, job: Callable[[], None], *, rank: int) -> ThreadCopy:
        copy = ThreadCopy()
        self._jobs.put((rank, next(self._order), copy, job))
        return copy

    def _run(self) -> None:
        while True:
            _, _, copy, job = self._jobs.get()
            if copy is None:
                return
            copy.carry_out(job)


def _copy(source: Parts, sources: Pages, target: Parts, targets: Pages) -> None:
    """target[targets[i]] = source[sources[i]], neighbours in one copy. numpy copies without the GIL."""
    for start, stop in _pieces(sources, targets):
        first, to, num = int(sources[start]), int(targets[start]), stop - start
        for source_part, target_part in zip(source, target, strict=True):
            np.copyto(target_part[to : to + num], source_part[first : first + num])


def _pieces(sources: Pages, targets: Pages) -> Iterator[tuple[int, int]]:
    """[start, stop) of the longest stretches that are consecutive on both sides."""
    breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    edges = [0, *breaks.tolist(), len(sources)]
    yield from itertools.pairwise(edges)
