"""A subscriber of the cache's events, which must know the cache's contents from the events alone."""

from headwater.cache.radix_tree import RadixTree
from headwater.cache.storage.names import StorageNames
from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from headwater.simulation.checks.violation import demand


class EventMirror:
    """Applies events turn by turn. The cache reports them to `recorder`."""

    def __init__(self, tree: RadixTree, names: StorageNames) -> None:
        self.recorder = KvEventsRecorder(tree, names)
        self._tree = tree
        self._names = names
        self._held: dict[str, set[bytes]] = {"device": set(), "host": set()}  # hashes of pages, by tier

    def follow(self) -> None:
        """Apply the events of a turn; each must be consistent with the earlier ones."""
        for event in self.recorder.take():
            match event:
                case BlockStored(medium="storage") | BlockRemoved(medium="storage"):
                    pass  # hints only: a store has other users
                case AllBlocksCleared():
                    for tier in event.tiers:
                        self._held.get(tier, set()).clear()
                case BlockRemoved():
                    held, gone = self._held[event.medium], set(event.block_hashes)
                    demand(gone <= held, "events_agree", "pages are reported as gone that were not there")
                    held -= gone
                case BlockStored():
                    held, new = self._held[event.medium], set(event.block_hashes)
                    demand(not new & held, "events_agree", "pages are reported twice")
                    held |= new

    def audit(self) -> None:
        """The state from the events is that of the tree."""
        found: dict[str, set[bytes]] = {"device": set(), "host": set()}
        for root in self._tree.roots.values():
            for node in self._tree.subtree(root):
                for tier in node.runs:
                    found[tier.name.lower()].update(self._names.hashes(self._tree, node))
        for tier, held in self._held.items():
            demand(held == found[tier], "events_agree", f"{tier}: {len(held)} pages told, {len(found[tier])} held")
