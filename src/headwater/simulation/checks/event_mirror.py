"""A subscriber of the cache's events, which must know the cache's contents from the events alone."""

from headwater.cache.radix_tree import RadixTree
from headwater.cache.storage.names import StorageNames
from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.kv_events import MEDIUMS, AllBlocksCleared, BlockRemoved, BlockStored, short_hashes
from headwater.simulation.checks.violation import demand


class EventMirror:
    """Applies events turn by turn. The cache reports them to `recorder`."""

    def __init__(self, tree: RadixTree, names: StorageNames) -> None:
        self.recorder = KvEventsRecorder(tree, names)
        self._tree = tree
        self._names = names
        self._held: dict[str, set[int]] = {medium: set() for medium in MEDIUMS.values()}  # hashes of pages

    def follow(self) -> None:
        """Apply the events of a turn; each must be consistent with the earlier ones."""
        for event in self.recorder.take():
            match event:
                case AllBlocksCleared():
                    for held in self._held.values():
                        held.clear()
                case BlockStored() | BlockRemoved() if event.medium not in self._held:
                    pass  # hints only: a store has other users
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
        found: dict[str, set[int]] = {medium: set() for medium in MEDIUMS.values()}
        for root in self._tree.roots.values():
            for node in self._tree.subtree(root):
                for tier in node.runs:
                    found[MEDIUMS[tier.name.lower()]].update(short_hashes(self._names.hashes(self._tree, node)))
        for medium, held in self._held.items():
            counts = f"{len(held)} pages told, {len(found[medium])} held"
            demand(held == found[medium], "events_agree", f"{medium}: {counts}")
