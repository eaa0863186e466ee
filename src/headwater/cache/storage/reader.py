"""Prefetches: looks pages up in a store and reads them into host memory."""

import numpy as np

from headwater.cache.jobs import Job
from headwater.cache.namespace import Namespace, Scope
from headwater.cache.page_pool import Owner, PageIds
from headwater.cache.prefetch import Prefetch
from headwater.cache.radix_tree import Node
from headwater.cache.storage.calls import StorageCalls
from headwater.cache.storage.generations import StorageGenerations
from headwater.cache.storage.health import CallKind
from headwater.cache.storage.host_side import HostSide
from headwater.cache.storage.names import Generations
from headwater.messages.base import TokenIds
from headwater.storage.backend import ReadStatus, StorageBackend
from headwater.storage.page_key import PageKey, chain_hashes, page_keys

_BATCH_PAGES = 32  # of one read; a prefetch that is stopped early loses at most these
_LOST = {ReadStatus.MISS: "missing", ReadStatus.CORRUPT: "damaged", ReadStatus.STALE: "retired"}


class StorageReader:
    """Looks sequences up in the store, and copies their pages to the host in batches."""

    def __init__(
        self,
        backend: StorageBackend,
        host: HostSide,
        *,
        calls: StorageCalls,
        generations: StorageGenerations,
        min_tokens: int,
    ) -> None:
        self._backend = backend
        self._host = host
        self._calls = calls
        self._generations = generations
        self._min_tokens = min_tokens
        self.prefetches: list[Prefetch] = []
        self._questions: dict[Namespace, Prefetch] = {}  # for generations alone

    def prefetch(self, namespace: Namespace, tokens: TokenIds, *, num_known_tokens: int) -> Prefetch | None:
        """Begin to copy the pages of `tokens` after the first `num_known_tokens` that the store has.

        If that is not worth it, asks only for the generations of a namespace that is new here. Pages computed after
        the answer can be stored.
        """
        if self._generations.is_barred(namespace):
            return None
        if len(tokens) - num_known_tokens < self._min_tokens:
            return self._ask_generations(namespace) if self._generations.known(namespace) is None else None
        size = self._host.tree.page_size
        first_page = num_known_tokens // size
        for running in self.prefetches:
            if running.covers(namespace, tokens, first_page=first_page):
                return running
        prefetch = Prefetch(
            namespace=namespace,
            tokens=tokens[: len(tokens) // size * size].copy(),
            first_page=first_page,
            started_s=self._host.clock.now(),
        )
        self.prefetches.append(prefetch)
        self._look_up(prefetch)
        return prefetch

    def retire(self, scope: Scope) -> int:
        """Drop the prefetches of pages in `scope`; returns how many."""
        return sum(prefetch.retire(scope, self._host.tree.page_size) for prefetch in self.prefetches)

    def advance(self) -> None:
        for prefetch in self.prefetches:
            if prefetch.wait_until_s is not None and self._host.clock.now() >= prefetch.wait_until_s:
                prefetch.is_stopped = True

    def _ask_generations(self, namespace: Namespace) -> Prefetch:
        if namespace in self._questions:
            return self._questions[namespace]
        question = Prefetch(
            namespace=namespace, tokens=np.empty(0, dtype=np.int32), first_page=0, started_s=self._host.clock.now()
        )

        def ended() -> None:
            question.is_done = True
            del self._questions[namespace]

        self._questions[namespace] = question
        self._generations.ask([namespace], ended=ended)
        return question

    def _look_up(self, prefetch: Prefetch) -> None:
        namespace, tokens, first = prefetch.namespace, prefetch.tokens, prefetch.first_page

        def work(job: Job) -> tuple[Generations, list[PageKey], list[bool]]:
            generations = self._backend.generations(self._host.names.scopes(namespace))
            hashes = chain_hashes(self._host.names.seed(namespace), tokens, self._host.tree.page_size)
            bucket = self._host.names.bucket(namespace, generations)
            keys = page_keys(bucket, hashes[first:], first_depth=first)
            return generations, keys, self._backend.exists(keys)

        def finish(result: tuple[Generations, list[PageKey], list[bool]]) -> None:
            generations, keys, exists = result
            self._generations.heard(namespace, generations)
            prefetch.generations = generations
            num_found = exists.index(False) if False in exists else len(exists)
            prefetch.keys = keys[:num_found]
            self._host.counters.count("storage_missed_pages", len(keys) - num_found)
            self._read_on(prefetch)

        def fail(cause: str) -> None:
            self._host.counters.count(f"storage_lookup_{cause}")
            self._end(prefetch)

        self._calls.begin(work, kind=CallKind.LOOK_UP, finish=finish, fail=fail)

    def _read_on(self, prefetch: Prefetch) -> None:
        """Read the next batch, or end the prefetch if it is stopped or dropped, or has no pages left to read."""
        keys = prefetch.keys[prefetch.num_read : prefetch.num_read + _BATCH_PAGES]
        if not keys or prefetch.is_stopped or prefetch.is_dropped:
            self._end(prefetch)
            return
        pages = self._host.tier.take(len(keys), owner=Owner.TRANSFER)
        if pages is None:
            self._host.counters.drop("prefetch_host_full", len(keys))
            self._end(prefetch)
            return
        views = [self._host.memory.view(int(page)) for page in pages]

        def work(job: Job) -> tuple[list[ReadStatus], float]:
            started_s = self._host.clock.now()
            # Read into other memory: when a read that hung returns late, the pages may have another owner.
            staging = [bytearray(self._host.memory.page_bytes) for _ in keys]
            statuses = self._backend.get(keys, [memoryview(page) for page in staging])
            with job.pages():
                for view, page, status in zip(views, staging, statuses, strict=True):
                    if status is ReadStatus.HIT:
                        view[:] = page
            return statuses, self._host.clock.now() - started_s

        def finish(result: tuple[list[ReadStatus], float]) -> None:
            statuses, took_s = result
            is_hit = [status is ReadStatus.HIT for status in statuses]
            num_good = is_hit.index(False) if False in is_hit else len(is_hit)
            for key, status in zip(keys[num_good:], statuses[num_good:], strict=True):
                self._host.counters.drop(f"prefetch_{status.value}", 1)
                if self._host.tier.observer is not None and status in _LOST:
                    self._host.tier.observer.lost([key.page], reason=_LOST[status], kind=self._backend.kind)
            self._host.counters.add("prefetch", num_good, took_s)
            self._attach(prefetch, pages, num_good)
            prefetch.num_read += num_good
            prefetch.is_stopped |= num_good < len(keys)
            self._read_on(prefetch)

        def fail(cause: str) -> None:
            self._attach(prefetch, pages, 0)
            self._host.counters.drop(f"prefetch_{cause}", len(keys))
            self._end(prefetch)

        prefetch.pages = pages
        self._calls.begin(work, kind=CallKind.READ, finish=finish, fail=fail)

    def _attach(self, prefetch: Prefetch, pages: PageIds, num_good: int) -> None:
        """Attach the first `num_good` of `pages` to the tree, behind those already read; free the others."""
        prefetch.pages = None
        size = self._host.tree.page_size
        start = prefetch.first_page + prefetch.num_read
        tokens = prefetch.tokens[start * size : (start + num_good) * size]
        node = self._node_at(prefetch, start) if num_good and not prefetch.is_dropped else None
        if node is None or self._host.tree.descend(node, tokens) is not None:  # gone, or computed meanwhile
            num_good = 0
        else:
            child = self._host.tree.add_child(node, tokens)
            good, generations = pages[:num_good], prefetch.generations
            self._host.tier.attach(child, good, giver=Owner.TRANSFER, parent=None, pins=0, generations=generations)
            prefetch.num_attached += num_good
        if num_good < len(pages):
            self._host.tier.pool.free(pages[num_good:], giver=Owner.TRANSFER)

    def _node_at(self, prefetch: Prefetch, num_pages: int) -> Node | None:
        """The node at which the first `num_pages` pages of the prefetch end; None if the tree no longer has them."""
        size = self._host.tree.page_size
        root = self._host.tree.root(prefetch.namespace)
        node, tokens = root, prefetch.tokens[: num_pages * size]
        while len(tokens):
            found = self._host.tree.descend(node, tokens)
            if found is None:
                self._host.tree.drop_root_if_unused(root)
                return None
            child, num_common = found
            if num_common * size < len(child.tokens):
                if num_common * size < len(tokens):
                    return None
                child = self._host.tree.split(child, num_common)
            node, tokens = child, tokens[len(child.tokens) :]
        return node

    def _end(self, prefetch: Prefetch) -> None:
        prefetch.is_done = True
        self.prefetches.remove(prefetch)
