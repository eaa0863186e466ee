"""Copies down to the store what the device and the host hold and the store may lack."""

from headwater.cache.lower_tiers import LowerTiers
from headwater.cache.namespace import Tier
from headwater.cache.radix_tree import Node, RadixTree

_AT_ONCE = 4  # copies in flight, of all kinds: more would only wait, and hold host pages meanwhile


class StorePush:
    """Looks at each node once, parents first: pages below a gap are of no use. `num_pages` have been begun."""

    def __init__(self, lower: LowerTiers, tree: RadixTree) -> None:
        self._lower = lower
        self._page_size = tree.page_size
        self.num_pages = 0
        self._dropped_before = self._num_dropped_in_all
        found = [node for root in tree.roots.values() for node in _by_use(root)]
        self._todo = found[::-1]  # the next one is the last

    @property
    def num_dropped(self) -> int:
        """Pages that were not copied, for lack of room or because the store did not take them."""
        return self._num_dropped_in_all - self._dropped_before

    def advance(self) -> bool:
        """Begin what may begin now; whether all has ended."""
        while self._todo and sum(self._lower.in_flight().values()) < _AT_ONCE:
            self._begin(self._todo.pop())
        return not self._todo and not self._lower.in_flight()

    def _begin(self, node: Node) -> None:
        storage, transfers = self._lower.storage, self._lower.transfers
        if not node.is_linked or storage is None or transfers is None:
            return
        host = node.runs.get(Tier.HOST)
        if host is not None and host.is_stored:
            return
        if host is not None:
            storage.persist(node)
        elif Tier.DEVICE in node.runs:
            transfers.offload(node)  # its arrival on the host is persisted
        else:
            return
        self.num_pages += len(node.tokens) // self._page_size

    @property
    def _num_dropped_in_all(self) -> int:
        transfers = self._lower.transfers
        return sum(transfers.counters.dropped_pages.values()) if transfers is not None else 0


def _by_use(root: Node) -> list[Node]:
    """The nodes below `root`, each behind its parent, those that were used last first."""
    found: list[Node] = []
    stack = [root]
    while stack:
        node = stack.pop()
        if not node.is_root:
            found.append(node)
        stack += sorted(node.children.values(), key=lambda child: child.last_used)
    return found
