"""The port through which the cache reports what it holds."""

from collections.abc import Sequence
from typing import Protocol

from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.radix_tree import Node
from headwater.messages.base import TokenIds


class CacheObserver(Protocol):
    """Receives every change, in order, on the loop. Must neither change the cache nor block.

    `stored` and `removed` report the device and the host. `persisted` and `lost` report a store. A store may have other
    users, so these two cover only what this engine has written, and what its reads have found.
    """

    def stored(self, node: Node, tier: Tier) -> None:
        """`node` has a run on `tier` from now on."""
        ...

    def removed(self, node: Node, tier: Tier, *, reason: str) -> None:
        """`node` has no run on `tier` any more. `reason` is `evicted` or `retired`."""
        ...

    def cleared(self, generation: int, scope: Scope) -> None:
        """A retirement of `scope` is complete; its runs were each reported as `removed` before."""
        ...

    def persisted(
        self, namespace: Namespace, hashes: Sequence[bytes], tokens: TokenIds, *, parent: bytes | None, kind: str
    ) -> None:
        """The store, of this kind, has these consecutive pages; may repeat. `parent`: the hash of the page before."""
        ...

    def lost(self, hashes: Sequence[bytes], *, reason: str, kind: str) -> None:
        """A read has found these pages unusable in the store. `reason` is `missing`, `damaged` or `retired`."""
        ...
