"""From changes of the prefix cache to events."""

from collections.abc import Sequence

from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.radix_tree import Node, RadixTree
from headwater.cache.storage.names import StorageNames
from headwater.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from headwater.messages.base import TokenIds


class KvEventsRecorder:
    """`cache.observer.CacheObserver` that keeps the events of a turn until `take`.

    Neighbouring removals become one event; those of a flush of everything become one `AllBlocksCleared`.
    """

    def __init__(self, tree: RadixTree, names: StorageNames) -> None:
        self._tree = tree
        self._names = names
        self._events: list[KvEvent] = []
        self._removed: list[bytes] = []
        self._removed_as: tuple[Tier, str] | None = None
        self._num_before_cut: int | None = None  # events when the removals of the retirement under way began

    def stored(self, node: Node, tier: Tier) -> None:
        self._close_removals()
        hashes = self._names.hashes(self._tree, node)
        above = node.parent
        has_parent = above is not None and not above.is_root
        self._events.append(
            BlockStored(
                block_hashes=tuple(hashes),
                parent_block_hash=self._names.hashes(self._tree, above)[-1] if above and has_parent else None,
                token_ids=tuple(node.tokens.tolist()),
                block_size=self._tree.page_size,
                medium=tier.name.lower(),
                cache_salt=node.namespace.cache_salt,
                extra_key=node.namespace.extra_key,
                weights_id=node.namespace.weights_id,
            )
        )

    def removed(self, node: Node, tier: Tier, *, reason: str) -> None:
        if self._removed_as != (tier, reason):
            self._close_removals()
            self._removed_as = (tier, reason)
        if reason == "retired" and self._num_before_cut is None:
            self._num_before_cut = len(self._events)
        self._removed += self._names.hashes(self._tree, node)

    def cleared(self, generation: int, scope: Scope) -> None:
        self._close_removals()
        begin, self._num_before_cut = self._num_before_cut, None
        if not scope.is_everything:
            self._store_cleared(generation, scope)
            return
        if begin is not None:
            del self._events[begin:]
        tiers = tuple(tier.name.lower() for tier in sorted(scope.tiers))
        self._events.append(AllBlocksCleared(generation=generation, tiers=tiers))

    def persisted(
        self, namespace: Namespace, hashes: Sequence[bytes], tokens: TokenIds, *, parent: bytes | None
    ) -> None:
        self._close_removals()
        self._events.append(
            BlockStored(
                block_hashes=tuple(hashes),
                parent_block_hash=parent,
                token_ids=tuple(tokens.tolist()),
                block_size=self._tree.page_size,
                medium="storage",
                cache_salt=namespace.cache_salt,
                extra_key=namespace.extra_key,
                weights_id=namespace.weights_id,
            )
        )

    def lost(self, hashes: Sequence[bytes], *, reason: str) -> None:
        if self._removed_as != (Tier.STORAGE, reason):
            self._close_removals()
            self._removed_as = (Tier.STORAGE, reason)
        self._removed += hashes

    def _store_cleared(self, generation: int, scope: Scope) -> None:
        """A flush of some namespaces of a store: this engine does not know all their blocks."""
        if Tier.STORAGE in scope.tiers:
            event = AllBlocksCleared(
                generation=generation, tiers=("storage",), cache_salt=scope.cache_salt, extra_key=scope.extra_key
            )
            self._events.append(event)

    def take(self) -> tuple[KvEvent, ...]:
        """All events since the last call, in order."""
        if not self._events and not self._removed:
            return ()
        self._close_removals()
        events, self._events = tuple(self._events), []
        return events

    def _close_removals(self) -> None:
        if self._removed_as is None:
            return
        tier, reason = self._removed_as
        event = BlockRemoved(block_hashes=tuple(self._removed), medium=tier.name.lower(), reason=reason)
        self._events.append(event)
        self._removed, self._removed_as = [], None
