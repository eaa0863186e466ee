"""The store that `serve` would be given: whether it opens, and keeps a page."""

import os
import time
from typing import Any

from headwater.doctor.finding import Finding, Level
from headwater.storage.backend import ReadStatus, StorageBackend, WriteStatus
from headwater.storage.errors import StorageError
from headwater.storage.page_key import Bucket, PageKey
from headwater.storage.registry import open_backend

_NAME_BYTES = 16
_SCOPE = b"headwater-doctor"  # always the same: a store keeps a counter for each scope
_PAGE_BYTES = 1 << 16
_TIMEOUT_S = 2.0
_REMEDIES = {
    "file": "name a folder that this user may write to, on a disk with room",
    "redis": "start the server, or correct its address: redis://[:PASSWORD@]HOST:PORT/DATABASE",
}


def store(kind: str, *, directory: str | None = None, url: str | None = None) -> Finding:
    """Write a page of 64 KiB into the store, read it and delete it. An address may hold a password and is not shown."""
    facts: dict[str, Any] = {"kind": kind, "directory": directory}
    started_s = time.perf_counter()
    try:
        backend = open_backend(kind, directory=directory, url=url, timeout_s=_TIMEOUT_S)
    except (ValueError, OSError, StorageError) as error:
        return Finding("store", f"{kind}: {error}", Level.PROBLEM, _REMEDIES.get(kind, ""), facts)
    try:
        fault, usage = _try(backend), backend.usage()
    except StorageError as error:
        return Finding("store", f"{kind}: {error}", Level.PROBLEM, _REMEDIES.get(kind, ""), facts)
    finally:
        backend.close()
    took_ms = (time.perf_counter() - started_s) * 1e3
    facts |= {"num_pages": usage.num_pages, "num_bytes": usage.num_bytes, "took_ms": round(took_ms, 1)}
    if fault:
        return Finding("store", f"{kind}: {fault}", Level.PROBLEM, _REMEDIES.get(kind, ""), facts)
    holds = f"holds {usage.num_pages:,} pages, {usage.num_bytes / (1 << 20):,.0f} MiB"
    return Finding("store", f"{kind}: wrote, read and deleted a page in {took_ms:.0f} ms; {holds}", facts=facts)


def _try(backend: StorageBackend) -> str:
    """What is wrong; empty if nothing is."""
    bucket = Bucket.of(os.urandom(_NAME_BYTES), scope_ids=(_SCOPE,), generations=backend.generations((_SCOPE,)))
    key = PageKey(bucket, os.urandom(_NAME_BYTES), 0)
    page, found = os.urandom(_PAGE_BYTES), bytearray(_PAGE_BYTES)
    (written,) = backend.put([key], [memoryview(page)])
    if written is not WriteStatus.STORED:
        return "it is full" if written is WriteStatus.FULL else f"a page was not stored: {written.value}"
    (read,) = backend.get([key], [memoryview(found)])
    backend.delete([key])
    if read is not ReadStatus.HIT or bytes(found) != page:
        return f"the page that was written is not there: {read.value}"
    return ""
