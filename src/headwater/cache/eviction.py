"""Which unpinned run of a tier is evicted next: the least recently used leaf."""

import heapq
import itertools

from headwater.cache.namespace import Tier
from headwater.cache.radix_tree import Node


class LruLeaves:
    """Candidates for eviction on one tier, in a heap. Stale entries are skipped when they are popped."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._heap: list[tuple[int, int, Node]] = []
        self._order = itertools.count()

    def offer(self, node: Node) -> None:
        """Add `node` if it could be evicted now. Cheap; adding it twice is harmless."""
        if self._is_candidate(node):
            heapq.heappush(self._heap, (node.last_used, next(self._order), node))

    def pop(self) -> Node | None:
        """The least recently used candidate, or None."""
        while self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            if not self._is_candidate(node):
                continue
            if node.last_used != last_used:
                self.offer(node)
                continue
            return node
        return None

    def _is_candidate(self, node: Node) -> bool:
        run = node.runs.get(self._tier)
        if run is None or run.pins:
            return False
        return not node.children or not any(self._tier in child.runs for child in node.children.values())
