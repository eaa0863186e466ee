"""Names of pages in storage, made from the model, the namespace, the generation and the tokens.

Everything that changes a page's bytes or its readers is hashed into its name. So servers of one model find each
other's pages in a shared store, other servers do not, and no store has to know about models or tenants.
All hashes are BLAKE2b with 128-bit digests (RFC 7693), one `person` per kind of name, parts length-prefixed.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from headwater.messages.base import TokenIds

DIGEST_BYTES = 16
LAYOUT_VERSION = 1  # order of a page's bytes: [num_layers, K and V, num_kv_heads, page_size, head_dim]


def _digest(kind: bytes, *parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=DIGEST_BYTES, person=kind)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))  # else ("ab", "c") and ("a", "bc") would have one name
        state.update(part)
    return state.digest()


def config_hash(config: Mapping[str, Any]) -> str:
    """Hex identity of a model's configuration, which has only JSON types. The order of keys does not matter."""
    return _digest(b"hw-config", msgspec.json.encode(config, order="sorted")).hex()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything except namespace and tokens that determines a page's bytes. Equal fingerprints share pages."""

    weights_id: str
    model_config_hash: str  # see `config_hash`
    kv_dtype: str
    page_size: int
    num_layers: int
    num_kv_heads: int  # of this rank
    head_dim: int
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    layout_version: int = LAYOUT_VERSION

    def digest(self) -> bytes:
        fields = (getattr(self, name) for name in self.__slots__)
        return _digest(b"hw-fingerprint", *(str(value).encode() for value in fields))

    def scope_domain(self) -> bytes:
        """The domain of a flush: one model configuration, with any weights, layout and ranks.

        Weights are left out, so that a flush also covers pages of earlier weights that may return. The configuration
        is included, so that servers of other models keep their pages.
        """
        return _digest(b"hw-domain", self.model_config_hash.encode())


def namespace_id(fingerprint: Fingerprint, *, cache_salt: str, extra_key: str, adapter: str = "") -> bytes:
    """Identity of a namespace in 16 bytes, which is also the seed of its chain hashes."""
    names = (cache_salt.encode(), extra_key.encode(), adapter.encode())
    return _digest(b"hw-namespace", fingerprint.digest(), *names)


def scope_id(domain: bytes, *, cache_salt: str | None = None, extra_key: str | None = None) -> bytes:
    """Name of the counter that a flush of this scope raises, in 16 bytes. None means all; "" is a value."""
    parts = (b"*" if name is None else b"=" + name.encode() for name in (cache_salt, extra_key))
    return _digest(b"hw-scope", domain, *parts)


def scope_ids(domain: bytes, *, cache_salt: str, extra_key: str) -> tuple[bytes, ...]:
    """The scopes of a namespace: everything, its salt, its extra key, and both."""
    return (
        scope_id(domain),
        scope_id(domain, cache_salt=cache_salt),
        scope_id(domain, extra_key=extra_key),
        scope_id(domain, cache_salt=cache_salt, extra_key=extra_key),
    )


def chain_hashes(parent: bytes, tokens: TokenIds, page_size: int) -> list[bytes]:
    """Hashes of the whole pages in `tokens`, 16 bytes each: h[i] = H(h[i-1] | tokens of page i).

    `parent` is the namespace's id for the first page, or the hash of the previous page. `tokens` is int32[n]; n need
    not be a multiple of `page_size`. Equal hashes mean equal text from the start.
    """
    assert len(parent) == DIGEST_BYTES and page_size >= 1
    packed = np.ascontiguousarray(tokens, dtype="<i4").tobytes()
    page_bytes = 4 * page_size
    hashes: list[bytes] = []
    blake2b = hashlib.blake2b
    for start in range(0, len(packed) // page_bytes * page_bytes, page_bytes):
        page = packed[start : start + page_bytes]
        parent = blake2b(parent + page, digest_size=DIGEST_BYTES, person=b"hw-page").digest()
        hashes.append(parent)
    return hashes


class Bucket(msgspec.Struct, frozen=True, cache_hash=True):
    """The pages of one namespace under one generation. The id is made of all the rest. Made by `of`.

    A bucket carries its scopes and their generations, so that a store itself can determine whether a raised counter
    made the bucket unreachable. A struct, since every look for a page in a dict hashes its bucket.
    """

    id: bytes
    namespace: bytes
    scope_ids: tuple[bytes, ...]
    generations: tuple[int, ...]

    @classmethod
    def of(cls, namespace: bytes, *, scope_ids: Sequence[bytes], generations: Sequence[int]) -> "Bucket":
        """The bucket under `generations`, the store's counters of `scope_ids` in the same order."""
        assert len(scope_ids) == len(generations)
        counters = (str(generation).encode() for generation in generations)
        return cls(
            id=_digest(b"hw-bucket", namespace, *scope_ids, *counters),
            namespace=namespace,
            scope_ids=tuple(scope_ids),
            generations=tuple(generations),
        )


class PageKey(NamedTuple):
    """The name of one page in storage."""

    bucket: Bucket
    page: bytes  # its chain hash
    depth: int  # its index in the sequence; of pages used together, deeper ones are evicted first


def page_keys(bucket: Bucket, hashes: Iterable[bytes], *, first_depth: int = 0) -> list[PageKey]:
    """Keys of consecutive pages; the first one is page `first_depth` of its sequence."""
    return [PageKey(bucket, page, first_depth + index) for index, page in enumerate(hashes)]
