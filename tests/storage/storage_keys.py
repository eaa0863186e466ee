"""Keys and pages for the storage tests."""

from dataclasses import dataclass, field

import numpy as np

from headwater.storage.backend import StorageBackend
from headwater.storage.page_key import (
    Bucket,
    Fingerprint,
    PageKey,
    chain_hashes,
    namespace_id,
    page_keys,
    scope_id,
    scope_ids,
)

PAGE_SIZE = 4


def make_fingerprint(**changes) -> Fingerprint:
    fields = {
        "weights_id": "weights-1",
        "model_config_hash": "config-1",
        "kv_dtype": "float32",
        "page_size": PAGE_SIZE,
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    return Fingerprint(**{**fields, **changes})


@dataclass
class Tenant:
    """A server's view of one namespace."""

    cache_salt: str = ""
    extra_key: str = ""
    fingerprint: Fingerprint = field(default_factory=make_fingerprint)

    @property
    def domain(self) -> bytes:
        return self.fingerprint.scope_domain()

    @property
    def namespace(self) -> bytes:
        return namespace_id(self.fingerprint, cache_salt=self.cache_salt, extra_key=self.extra_key)

    def scope(self, cache_salt: str | None = None, extra_key: str | None = None) -> bytes:
        return scope_id(self.domain, cache_salt=cache_salt, extra_key=extra_key)

    def bucket(self, backend: StorageBackend) -> Bucket:
        scopes = scope_ids(self.domain, cache_salt=self.cache_salt, extra_key=self.extra_key)
        return Bucket.of(self.namespace, scope_ids=scopes, generations=backend.generations(scopes))

    def keys(self, backend: StorageBackend, num_pages: int, *, text: int = 0) -> list[PageKey]:
        """Keys of the first pages of text number `text`, under today's generation."""
        tokens = np.arange(num_pages * PAGE_SIZE, dtype=np.int32) + 1000 * text
        return page_keys(self.bucket(backend), chain_hashes(self.namespace, tokens, PAGE_SIZE))


def make_pages(num_pages: int, *, page_bytes: int = 1000, seed: int = 0) -> list[memoryview]:
    """Random pages, read-only."""
    rng = np.random.default_rng(seed)
    return [memoryview(rng.bytes(page_bytes)) for _ in range(num_pages)]


def make_buffers(pages: list[memoryview]) -> list[memoryview]:
    return [memoryview(bytearray(len(page))) for page in pages]
