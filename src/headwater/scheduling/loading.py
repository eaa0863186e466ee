"""Requests that wait for pages on their way up from the host or from storage. They hold nothing and block nobody."""

from collections.abc import Iterator

from headwater.cache.lease import Lease
from headwater.cache.namespace import Namespace
from headwater.cache.prefix_cache import PrefixCache
from headwater.messages.base import TokenIds
from headwater.scheduling.counters import Counters
from headwater.scheduling.request import Phase, Request


class LoadingRequests:
    """Who waits for which copy. A request comes in waiting and leaves waiting, to match anew."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def seek_in_storage(self, request: Request, namespace: Namespace, tokens: TokenIds) -> bool:
        """Ask storage for what a new request may match, int32[T]; whether it waits here for the answer."""
        request.prefetch = self._cache.prefetch(namespace, tokens)
        if request.prefetch is None or not self._cache.is_awaited(request.prefetch):
            return False
        self._add(request)
        return True

    def begin(self, request: Request, lease: Lease, *, max_cached_tokens: int) -> bool:
        """Bring up pages of the host first, if that is worth it; then the lease is no longer the caller's."""
        load = self._cache.load(lease, max_cached_tokens=max_cached_tokens) if request.may_load else None
        if load is None:
            return False
        request.load = load
        self._add(request)
        return True

    def take_arrived(self) -> list[Request]:
        """Requests whose pages have come match anew; one whose load was dropped computes instead."""
        arrived = [request for request in self._requests if self._has_arrived(request)]
        for request in arrived:
            load, request.load = request.load, None
            if load is not None:
                request.may_load = False  # once is enough: pages that were evicted again are computed
                if not load.was_dropped:
                    request.num_loaded_tokens += load.num_tokens
            self._requests.remove(request)
            request.enter(Phase.WAITING)
        return arrived

    def remove(self, request: Request) -> None:
        """Its copies go on by themselves."""
        self._requests.remove(request)
        request.load = request.prefetch = None

    def attribute_hits(self, request: Request, counters: Counters) -> None:
        """Say which tier each cached prompt token came from: what was brought up for this request, and the rest."""
        num_prefetched = 0
        if request.prefetch is not None:
            num_prefetched = request.prefetch.num_attached * self._cache.page_size
            request.prefetch.is_stopped = True  # best effort: it starts with what has come
            request.prefetch = None
        num_loaded = min(request.num_loaded_tokens, request.num_cached_tokens)
        request.num_storage_tokens = min(num_prefetched, num_loaded)
        request.num_host_tokens = num_loaded - request.num_storage_tokens
        counters.cached_tokens_storage += request.num_storage_tokens
        counters.cached_tokens_host += request.num_host_tokens
        counters.cached_tokens_device += request.num_cached_tokens - num_loaded

    def _add(self, request: Request) -> None:
        request.enter(Phase.LOADING)
        self._requests.append(request)

    def _has_arrived(self, request: Request) -> bool:
        if request.load is not None:
            return request.load.is_done
        assert request.prefetch is not None
        return not self._cache.is_awaited(request.prefetch)
