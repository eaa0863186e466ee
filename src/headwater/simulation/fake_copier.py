"""Copies of canaries between the fake runner's KV and a host tier, with scripted delays and failures."""

import random

import numpy as np
import numpy.typing as npt

from headwater.cache.page_pool import PageIds


class FakeCopy:
    """A copy that happens, all at once, when it is found done: until then both sides may be looked at, not used."""

    def __init__(
        self,
        source: npt.NDArray[np.uint64],
        sources: PageIds,
        target: npt.NDArray[np.uint64],
        targets: PageIds,
        *,
        num_polls: int,
        fails: bool,
    ) -> None:
        self._source, self._sources = source, sources.copy()
        self._target, self._targets = target, targets.copy()
        self._polls_left = num_polls
        self._fails = fails
        self._is_done = False
        self.has_failed = False

    def is_done(self) -> bool:
        if not self._is_done:
            self._polls_left -= 1
            if self._polls_left < 0:
                self._is_done = True
                self.has_failed = self._fails
                # A copy that fails may have written anything.
                copied = self._source[self._sources]
                self._target[self._targets] = copied ^ np.uint64(0x5555) if self._fails else copied
        return self._is_done


class FakeHostPages:
    """`cache.host_pages.HostPages` over a host tier of canaries."""

    def __init__(self, host: npt.NDArray[np.uint64]) -> None:
        self._bytes = host.view(np.uint8).reshape(host.shape[0], -1)

    @property
    def page_bytes(self) -> int:
        return self._bytes.shape[1]

    def view(self, page: int) -> memoryview:
        return memoryview(self._bytes[page])


class FakeCopier:
    """`cache.copier.PageCopier` over canaries. Reads its source only when the copy ends, so that a page that was
    reused too early shows in the text."""

    def __init__(self, kv: npt.NDArray[np.uint64], *, num_host_pages: int, seed: int = 0) -> None:
        self.host = np.zeros((num_host_pages, kv.shape[1]), dtype=np.uint64)
        self.max_polls = 0  # a copy takes up to this many turns
        self.failure_rate = 0.0
        self._kv = kv
        self._source = random.Random(seed)

    def offload(self, device_pages: PageIds, host_pages: PageIds) -> FakeCopy:
        return self._copy(self._kv, device_pages, self.host, host_pages)

    def restore(self, host_pages: PageIds, device_pages: PageIds) -> FakeCopy:
        return self._copy(self.host, host_pages, self._kv, device_pages)

    def _copy(
        self,
        source: npt.NDArray[np.uint64],
        sources: PageIds,
        target: npt.NDArray[np.uint64],
        targets: PageIds,
    ) -> FakeCopy:
        return FakeCopy(
            source,
            sources,
            target,
            targets,
            num_polls=self._source.randint(0, self.max_polls),
            fails=self._source.random() < self.failure_rate,
        )
