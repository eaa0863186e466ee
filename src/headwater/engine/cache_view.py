"""The prefix tree as operators see it."""

import itertools
from collections.abc import Iterator

from headwater.cache.namespace import Namespace
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Node
from headwater.cache.storage.names import StorageNames
from headwater.engine.kv_events_publisher import KvEventsPublisher
from headwater.messages.base import pack_ids
from headwater.messages.cache import CacheTree, GetCacheTree, TreeBlocks, TreeNode, TreeRoot

_NUM_FIRST_IDS = 8


class CacheTreeView:
    """Takes a bounded picture of the tree: `max_nodes` nodes at most, down to `depth`.

    With all blocks, if the message asks for them, as of the events that have been published so far.
    """

    def __init__(
        self,
        cache: PrefixCache,
        message: GetCacheTree,
        *,
        names: StorageNames,
        events: KvEventsPublisher | None = None,
        adapter_id: str | None = None,
    ) -> None:
        """`adapter_id`: only what this content of a LoRA adapter has computed; None: everything."""
        self._cache = cache
        self._message = message
        self._names = names
        self._events = events
        self._adapter_id = adapter_id
        self._num_left = message.max_nodes
        self._is_cut = False

    def take(self) -> CacheTree:
        roots = []
        for namespace, root in self._roots():
            below = list(itertools.islice(self._cache.tree.subtree(root), 1, None))
            roots.append(
                TreeRoot(
                    cache_salt=namespace.cache_salt,
                    extra_key=namespace.extra_key,
                    weights_id=namespace.weights_id,
                    num_tokens=sum(len(node.tokens) for node in below),
                    num_nodes=len(below),
                    children=self._children(root, self._message.depth),
                    adapter_id=namespace.adapter,
                )
            )
        has_blocks = self._message.blocks
        epoch, next_event = self._events.position() if self._events is not None and has_blocks else ("", None)
        return CacheTree(
            call_id=self._message.call_id,
            roots=tuple(roots),
            generation=self._cache.generation,
            is_cut=self._is_cut,
            block_size=self._cache.tree.page_size,
            blocks=tuple(self._blocks()) if has_blocks else (),
            epoch=epoch,
            next_event=next_event,
        )

    def _roots(self) -> Iterator[tuple[Namespace, Node]]:
        """The roots that were asked for."""
        for namespace, root in self._cache.tree.roots.items():
            if self._adapter_id is None or namespace.adapter == self._adapter_id:
                yield namespace, root

    def _blocks(self) -> Iterator[TreeBlocks]:
        """Every node's blocks, as packed bytes: the API process unpacks them."""
        tree = self._cache.tree
        for index, (_, root) in enumerate(self._roots()):
            for node in itertools.islice(tree.subtree(root), 1, None):
                above = node.parent
                is_first = above is None or above.is_root
                yield TreeBlocks(
                    root=index,
                    block_hashes=b"".join(self._names.hashes(tree, node)),
                    parent=b"" if is_first or above is None else self._names.hashes(tree, above)[-1],
                    token_ids=pack_ids(node.tokens),
                    tiers=tuple(tier.name.lower() for tier in node.runs),
                )

    def _children(self, node: Node, depth: int) -> tuple[TreeNode, ...]:
        if depth <= 0:
            self._is_cut |= bool(node.children)
            return ()
        pictures = []
        for child in sorted(node.children.values(), key=lambda each: -each.num_hits):
            if self._num_left <= 0:
                self._is_cut = True
                break
            self._num_left -= 1
            pictures.append(
                TreeNode(
                    num_tokens=len(child.tokens),
                    first_ids=tuple(child.tokens[:_NUM_FIRST_IDS].tolist()),
                    tiers={tier.name.lower(): run.pins for tier, run in child.runs.items()},
                    num_hits=child.num_hits,
                    children=self._children(child, depth - 1),
                    num_children=len(child.children),
                )
            )
        return tuple(pictures)
