"""Who is told what the cache holds."""

from collections.abc import Sequence
from typing import Protocol

from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.radix_tree import Node
from headwater.messages.base import TokenIds


class CacheObserver(Protocol):
    """Called in the loop, in the order things happen. Must not change the cache, nor block.

    `stored` and `removed` tell of device and host. A store is told apart: it belongs to others, too, so that what
    is known of it are only this engine's own writes and what its reads found.
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
        self, namespace: Namespace, hashes: Sequence[bytes], tokens: TokenIds, *, parent: bytes | None
    ) -> None:
        """The store has these consecutive pages, perhaps not for the first time. `parent`: the page before them."""
        ...

    def lost(self, hashes: Sequence[bytes], *, reason: str) -> None:
        """The store was found to have these pages no more. `reason` is `missing`, `damaged` or `retired`."""
        ...
