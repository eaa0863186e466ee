"""Requests that wait for pages from the host or from storage. They hold no pages and block no other request."""

from collections.abc import Iterator

from headwater.cache.lease import Lease
from headwater.cache.namespace import Namespace
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.tier_pages import count_use
from headwater.clock import Clock
from headwater.messages.base import TokenIds
from headwater.scheduling.counters import Counters
from headwater.scheduling.request import Loading, Phase, Request


class LoadingRequests:
    """Requests with the restores and prefetches that they wait for. Writes `Request.loading`.

    A request arrives in phase WAITING and leaves in phase WAITING, to match anew.
    """

    def __init__(self, cache: PrefixCache, *, clock: Clock) -> None:
        self._cache = cache
        self._clock = clock
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def seek_in_storage(self, request: Request, namespace: Namespace, tokens: TokenIds) -> bool:
        """Ask storage for what a new request may match, int32[T]; whether it waits here for the answer."""
        prefetch = request.loading.prefetch = self._cache.prefetch(namespace, tokens)
        if prefetch is None or not self._cache.is_awaited(prefetch):
            return False
        self._add(request)
        return True

    def begin(self, request: Request, lease: Lease, *, max_cached_tokens: int) -> bool:
        """Restore pages of the host first, if that is worth it; then the caller no longer owns the lease."""
        if not request.loading.may_restore:
            return False
        restore = self._cache.restore(lease, max_cached_tokens=max_cached_tokens)
        if restore is None:
            return False
        request.loading.restore = restore
        self._add(request)
        return True

    def allow_again(self, request: Request) -> None:
        """`request` may restore once more: its pages have been copied to the host."""
        request.loading.may_restore = True

    def take_arrived(self) -> list[Request]:
        """Requests whose pages have arrived, to match anew. A request whose restore was dropped computes instead."""
        arrived = [request for request in self._requests if self._has_arrived(request.loading)]
        for request in arrived:
            restore, request.loading.restore = request.loading.restore, None
            if restore is not None:
                request.loading.may_restore = False  # once is enough: pages that were evicted again are computed
                if not restore.was_dropped:
                    request.loading.num_restored_tokens += restore.num_tokens
            self._requests.remove(request)
            if not request.has_begun:  # later waits are no part of its time in the queue
                request.loading.seconds += self._clock.now() - request.loading.since_s
            request.enter(Phase.WAITING)
        return arrived

    def remove(self, request: Request) -> None:
        """Stop waiting. The copies end by themselves."""
        self._requests.remove(request)
        request.loading.restore = request.loading.prefetch = None

    def count_hits(self, request: Request, lease: Lease, counters: Counters) -> None:
        """`request` starts for the first time, with what `lease` has found of its prompt."""
        count_use(lease.run.chain() if lease.run else ())
        counters.copied_tokens += 0 if lease.part is None else lease.part.num_tokens
        self.attribute_hits(request, min(request.progress.num_computed, request.num_prompt_tokens), counters)

    def attribute_hits(self, request: Request, num_cached_tokens: int, counters: Counters) -> None:
        """Count the cached prompt tokens by tier: those that were brought up for this request, and the rest."""
        found, num_prefetched = request.loading, 0
        if found.prefetch is not None:
            num_prefetched = found.prefetch.num_attached * self._cache.page_size
            found.prefetch.is_stopped = True  # best effort: the request starts with what has arrived
            found.prefetch = None
        num_restored = min(found.num_restored_tokens, num_cached_tokens)
        found.num_cached_tokens = num_cached_tokens
        found.num_storage_tokens = min(num_prefetched, num_restored)
        found.num_host_tokens = num_restored - found.num_storage_tokens
        counters.cached_tokens_storage += found.num_storage_tokens
        counters.cached_tokens_host += found.num_host_tokens
        counters.cached_tokens_device += num_cached_tokens - num_restored

    def _add(self, request: Request) -> None:
        request.enter(Phase.LOADING)
        request.loading.since_s = self._clock.now()
        self._requests.append(request)

    def _has_arrived(self, loading: Loading) -> bool:
        if loading.restore is not None:
            return loading.restore.is_done
        assert loading.prefetch is not None
        return not self._cache.is_awaited(loading.prefetch)
