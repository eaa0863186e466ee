"""A subscriber of the cache's events, which must know the cache's contents from the events alone."""

import numpy as np

from headwater.cache.namespace import Namespace
from headwater.cache.radix_tree import RadixTree
from headwater.cache.storage.names import StorageNames
from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.kv_events import MEDIUMS, AllBlocksCleared, BlockRemoved, BlockStored, short_hashes
from headwater.simulation.checks.violation import demand
from headwater.storage.page_key import DIGEST_BYTES, chain_hashes


class EventMirror:
    """Applies events turn by turn. The cache reports them to `recorder`."""

    def __init__(self, tree: RadixTree, names: StorageNames) -> None:
        self.recorder = KvEventsRecorder(tree, names)
        self._tree = tree
        self._names = names
        self._held: dict[str, set[int]] = {medium: set() for medium in MEDIUMS.values()}  # hashes of pages
        self._full_names: dict[int, bytes] = {}  # of all pages, ever
        self._seeds: dict[int, bytes] = {}  # of their namespaces

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
                    self._check_place(event)

    def _check_place(self, event: BlockStored) -> None:
        """The names of the pages follow from what the event says: namespace, tokens, and the page before them."""
        namespace = Namespace(event.cache_salt, event.extra_key, event.adapter_id, event.weights_id)
        seed, before = self._names.seed(namespace), event.parent_block_hash
        start = seed if before is None else self._full_names.get(before, b"").ljust(DIGEST_BYTES)
        right = chain_hashes(start, np.array(event.token_ids, dtype=np.int32), event.block_size)
        is_right = event.full_block_hashes == right
        demand(is_right, "events_agree", "pages are reported with other tokens, or behind another page")
        for short, full in zip(event.block_hashes, right, strict=True):
            self._full_names[short] = full
            demand(self._seeds.setdefault(short, seed) == seed, "events_agree", "an event is of another namespace")
        in_place = before is None or self._seeds.get(before) == seed
        demand(in_place, "events_agree", "the page before is of another namespace")

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
