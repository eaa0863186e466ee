"""From changes of the prefix cache to events."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.radix_tree import Node, RadixTree
from headwater.cache.storage.names import StorageNames
from headwater.kv_events import (
    DEVICE,
    FILE_STORE,
    HOST,
    OTHER_STORE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    salt_keys,
    short_hashes,
)
from headwater.messages.base import TokenIds

_MEDIUM = {Tier.DEVICE: DEVICE, Tier.HOST: HOST}


class _Removals(NamedTuple):
    """An event to be: those of a flush of everything are replaced before their hashes are needed."""

    names: list[bytes]
    medium: str
    reason: str


class KvEventsRecorder:
    """`cache.observer.CacheObserver` that keeps the events of a turn until `take`.

    Neighbouring removals become one event. Those of a flush that empties the cache become one `AllBlocksCleared`.
    """

    def __init__(
        self,
        tree: RadixTree,
        names: StorageNames,
        *,
        epoch: str = "",
        name_of_adapter: Callable[[str], str] = lambda adapter_id: adapter_id,
    ) -> None:
        """`name_of_adapter`: a name that a LoRA adapter's content has now, or an empty one."""
        self._name_of = name_of_adapter
        self.epoch = epoch
        self._tree = tree
        self._names = names
        self._events: list[KvEvent | _Removals] = []
        self._removing: _Removals | None = None  # the last of the events, while more may join it
        self._num_before_cut: int | None = None  # events when the removals of the retirement under way began
        self._store_medium = FILE_STORE  # of the store that was last heard of
        self._is_store_known = False  # whether blocks of a store have been reported and not cleared since

    def stored(self, node: Node, tier: Tier) -> None:
        above = node.parent
        has_parent = above is not None and not above.is_root
        self._add_stored(
            node.namespace,
            self._names.hashes(self._tree, node),
            node.tokens,
            medium=_MEDIUM[tier],
            parent=self._names.hashes(self._tree, above)[-1] if above and has_parent else None,
        )

    def removed(self, node: Node, tier: Tier, *, reason: str) -> None:
        if reason == "retired" and self._num_before_cut is None:
            self._removing = None
            self._num_before_cut = len(self._events)
        self._removals(_MEDIUM[tier], reason).names.extend(self._names.hashes(self._tree, node))

    def cleared(self, generation: int, scope: Scope) -> None:
        """Consumers drop every tier on `AllBlocksCleared`, so it is sent only if no tier has anything left."""
        self._removing = None
        begin, self._num_before_cut = self._num_before_cut, None
        is_store_cleared = Tier.STORAGE in scope.tiers
        is_tree_empty = not any(root.children for root in self._tree.roots.values())
        if scope.is_everything and is_tree_empty and (is_store_cleared or not self._is_store_known):
            if begin is not None:
                del self._events[begin:]
            self._is_store_known = False
            tiers = tuple(tier.name.lower() for tier in sorted(scope.tiers))
            self._events.append(AllBlocksCleared(generation=generation, tiers=tiers, epoch=self.epoch))
        elif is_store_cleared:
            self._is_store_known &= not scope.is_everything
            self._add_store_cleared(generation, scope)

    def persisted(
        self, namespace: Namespace, hashes: Sequence[bytes], tokens: TokenIds, *, parent: bytes | None, kind: str
    ) -> None:
        self._hear_of_store(kind)
        self._is_store_known = True
        self._add_stored(namespace, hashes, tokens, medium=self._store_medium, parent=parent)

    def lost(self, hashes: Sequence[bytes], *, reason: str, kind: str) -> None:
        self._hear_of_store(kind)
        self._removals(self._store_medium, reason).names.extend(hashes)

    def take(self) -> tuple[KvEvent, ...]:
        """All events since the last call, in order."""
        if not self._events:
            return ()
        self._removing = None
        events, self._events = self._events, []
        return tuple(self._named(each) if isinstance(each, _Removals) else each for each in events)

    def _add_stored(
        self, namespace: Namespace, hashes: Sequence[bytes], tokens: TokenIds, *, medium: str, parent: bytes | None
    ) -> None:
        self._removing = None
        salt = namespace.cache_salt
        self._events.append(
            BlockStored(
                block_hashes=short_hashes(hashes),
                parent_block_hash=None if parent is None else short_hashes((parent,))[0],
                token_ids=tokens.tolist(),
                block_size=self._tree.page_size,
                lora_id=None,
                medium=medium,
                lora_name=self._name_of(namespace.adapter) if namespace.adapter else None,
                extra_keys=salt_keys(salt, num_blocks=len(hashes), is_start=parent is None),
                full_block_hashes=list(hashes),
                cache_salt=salt,
                extra_key=namespace.extra_key,
                weights_id=namespace.weights_id,
                adapter_id=namespace.adapter,
                epoch=self.epoch,
            )
        )

    def _add_store_cleared(self, generation: int, scope: Scope) -> None:
        """A flush of a store, whose blocks this engine does not know: an event that names none, so others skip it."""
        event = BlockRemoved(
            block_hashes=(),
            medium=self._store_medium,
            reason="cleared",
            generation=generation,
            cache_salt=scope.cache_salt,
            extra_key=scope.extra_key,
            epoch=self.epoch,
        )
        self._events.append(event)

    def _hear_of_store(self, kind: str) -> None:
        self._store_medium = FILE_STORE if kind == "file" else OTHER_STORE

    def _removals(self, medium: str, reason: str) -> _Removals:
        """The event that is being filled, or a new one if it has another tier or reason."""
        if self._removing is None or self._removing[1:] != (medium, reason):
            self._removing = _Removals([], medium, reason)
            self._events.append(self._removing)
        return self._removing

    def _named(self, removals: _Removals) -> BlockRemoved:
        hashes = short_hashes(removals.names)
        return BlockRemoved(block_hashes=hashes, medium=removals.medium, reason=removals.reason, epoch=self.epoch)
