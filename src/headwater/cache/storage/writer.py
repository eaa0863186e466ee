"""Persists: writes host pages to a store."""

import itertools
from collections.abc import Callable

from headwater.cache.jobs import Job
from headwater.cache.namespace import Tier
from headwater.cache.radix_tree import Node, Run
from headwater.cache.storage.calls import StorageCalls
from headwater.cache.storage.generations import StorageGenerations
from headwater.cache.storage.health import CallKind
from headwater.cache.storage.host_side import HostSide
from headwater.storage.backend import StorageBackend, WriteStatus
from headwater.storage.page_key import PageKey


class StorageWriter:
    """Persists host pages. They stay pinned until the call has ended, which writes from a copy of its own."""

    def __init__(
        self,
        backend: StorageBackend,
        host: HostSide,
        *,
        calls: StorageCalls,
        generations: StorageGenerations,
    ) -> None:
        self._backend = backend
        self._host = host
        self._calls = calls
        self._generations = generations
        self.reading: list[Run] = []  # host runs that are being persisted

    def persist(self, node: Node) -> None:
        """Begin to store the host pages of `node`, unless a flush may have made them outdated."""
        run = node.runs.get(Tier.HOST)
        if run is None:
            return
        num_pages, namespace = len(run.pages), node.namespace
        if run.generations is None or self._generations.is_barred(namespace):
            self._host.counters.drop("persist_generation_unknown", num_pages)
            return
        generations = run.generations
        keys = self._host.names.keys(self._host.tree, node, generations)
        report = self._report_of(node, keys)
        views = [self._host.memory.view(int(page)) for page in run.pages]

        def work(job: Job) -> tuple[list[WriteStatus], float]:
            started_s = self._host.clock.now()
            with job.pages():
                copies = [memoryview(bytes(view)) for view in views]
            statuses = self._backend.put(keys, copies)
            return statuses, self._host.clock.now() - started_s

        def finish(result: tuple[list[WriteStatus], float]) -> None:
            statuses, took_s = result
            self._end(run)
            num_stored = sum(1 for s in statuses if s in (WriteStatus.STORED, WriteStatus.PRESENT))
            run.is_stored = num_stored == num_pages
            self._host.counters.add("persist", num_stored, took_s)
            for status in statuses:
                if status not in (WriteStatus.STORED, WriteStatus.PRESENT):
                    self._host.counters.drop(f"persist_{status.value}", 1)
            if WriteStatus.STALE in statuses:
                self._generations.forget(namespace)
            elif report is not None and self._generations.known(namespace) == generations:  # not flushed meanwhile
                report([status in (WriteStatus.STORED, WriteStatus.PRESENT) for status in statuses])

        def fail(cause: str) -> None:
            self._end(run)
            self._host.counters.drop(f"persist_{cause}", num_pages)

        self._host.tier.pin(run)
        self.reading.append(run)
        self._calls.begin(work, kind=CallKind.WRITE, finish=finish, fail=fail)

    def _report_of(self, node: Node, keys: list[PageKey]) -> Callable[[list[bool]], None] | None:
        """A function that reports to the observer which pages of `node`, as it is now, are stored; None without one."""
        observer = self._host.tier.observer
        if observer is None:
            return None
        namespace, tokens, size = node.namespace, node.tokens, self._host.tree.page_size
        above = node.parent
        has_parent = above is not None and not above.is_root
        parent = self._host.names.hashes(self._host.tree, above)[-1] if above is not None and has_parent else None
        hashes, kind = [key.page for key in keys], self._backend.kind

        def report(is_there: list[bool]) -> None:
            start = 0
            for present, group in itertools.groupby(is_there):
                end = start + len(list(group))
                before = hashes[start - 1] if start else parent
                if present:
                    stored = tokens[start * size : end * size]
                    observer.persisted(namespace, hashes[start:end], stored, parent=before, kind=kind)
                start = end

        return report

    def _end(self, run: Run) -> None:
        self.reading.remove(run)
        for part in list(run.chain()):  # a split meanwhile has made several runs of it
            self._host.tier.unpin(part)
