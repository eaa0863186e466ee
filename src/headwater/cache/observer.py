"""Who is told what the cache holds."""

from typing import Protocol

from headwater.cache.namespace import Scope, Tier
from headwater.cache.radix_tree import Node


class CacheObserver(Protocol):
    """Called in the loop, in the order things happen. Must not change the cache, nor block."""

    def stored(self, node: Node, tier: Tier) -> None:
        """`node` has a run on `tier` from now on."""
        ...

    def removed(self, node: Node, tier: Tier, *, reason: str) -> None:
        """`node` has no run on `tier` any more. `reason` is `evicted` or `retired`."""
        ...

    def cleared(self, generation: int, scope: Scope) -> None:
        """A retirement of `scope` is complete; its runs were each reported as `removed` before."""
        ...
