"""Storage backends by name."""

from pathlib import Path
from typing import get_args

from headwater.messages.choices import StoreKind
from headwater.storage.backend import StorageBackend
from headwater.storage.file.backend import FileBackend
from headwater.storage.memory import MemoryBackend

KINDS: tuple[str, ...] = get_args(StoreKind)
DEFAULT_CAPACITY_BYTES = 16 << 30


def open_backend(
    kind: str,
    *,
    directory: str | Path | None = None,
    url: str | None = None,
    capacity_bytes: int | None = None,
    ttl_s: int | None = 86_400,
    timeout_s: float = 5.0,
) -> StorageBackend:
    """Open a store; the caller closes it.

    `file` needs `directory`. `redis` needs `url`; only `redis` uses `ttl_s` and `timeout_s`. Without `capacity_bytes`,
    `file` and `memory` hold 16 GiB, and `redis` as much as its server allows. ValueError for mistakes of the user,
    StorageError if a file store's folder cannot be opened. A redis server is contacted by the first call, not here.
    """
    if kind not in KINDS:
        raise ValueError(f"storage backend must be one of {', '.join(KINDS)}, found {kind!r}")
    if directory is not None and kind != "file":
        raise ValueError(f"storage directory is for the file backend; the backend is {kind!r}")
    if url is not None and kind != "redis":
        raise ValueError(f"storage url is for the redis backend; the backend is {kind!r}")
    if capacity_bytes is not None and capacity_bytes < 1:
        raise ValueError(f"storage size must be at least 1 byte, found {capacity_bytes}")
    match kind:
        case "file":
            if not directory:
                raise ValueError("the file backend needs a storage directory")
            return FileBackend(directory, capacity_bytes=capacity_bytes or DEFAULT_CAPACITY_BYTES)
        case "redis":
            if not url:
                raise ValueError("the redis backend needs a storage url, for example redis://127.0.0.1:6379/0")
            from headwater.storage.redis.backend import RedisBackend  # a third of an engine's imports

            return RedisBackend(url, capacity_bytes=capacity_bytes, ttl_s=ttl_s, timeout_s=timeout_s)
        case _:
            return MemoryBackend(capacity_bytes=capacity_bytes or DEFAULT_CAPACITY_BYTES)
