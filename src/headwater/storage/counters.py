"""The counters of a backend, shared by its threads."""

import threading
from collections import Counter
from collections.abc import Sequence

from headwater.storage.backend import ReadStatus, WriteStatus


class StorageCounters:
    """Monotonic counts by name, for metrics; zero when the backend is made.

    Names: `read_<status>` and `write_<status>` in pages, `read_bytes` and `written_bytes` of payload,
    `defect_<kind>` (reasons why pages were corrupt), `evicted_pages`, `reaped_pages`, `reopened`. Reads and writes are
    counted from 0 on: Prometheus does not see the increase to the first value of a series.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counter({f"read_{status}": 0 for status in ReadStatus})
        self._counts.update({f"write_{status}": 0 for status in WriteStatus})

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def add_reads(self, statuses: Sequence[ReadStatus], buffers: Sequence[memoryview]) -> None:
        hits = (len(b) for b, status in zip(buffers, statuses, strict=True) if status is ReadStatus.HIT)
        with self._lock:
            self._counts.update(f"read_{status}" for status in statuses)
            self._counts["read_bytes"] += sum(hits)

    def add_writes(self, statuses: Sequence[WriteStatus], pages: Sequence[memoryview]) -> None:
        stored = (len(p) for p, status in zip(pages, statuses, strict=True) if status is WriteStatus.STORED)
        with self._lock:
            self._counts.update(f"write_{status}" for status in statuses)
            self._counts["written_bytes"] += sum(stored)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)
