"""The prefix tree as operators see it."""

import itertools

from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Node
from headwater.messages.cache import CacheTree, GetCacheTree, TreeNode, TreeRoot

_NUM_FIRST_IDS = 8


class CacheTreeView:
    """Takes a bounded picture of the tree: `max_nodes` nodes at most, down to `depth`."""

    def __init__(self, cache: PrefixCache, message: GetCacheTree) -> None:
        self._cache = cache
        self._message = message
        self._num_left = message.max_nodes
        self._is_cut = False

    def take(self) -> CacheTree:
        roots = []
        for namespace, root in self._cache.tree.roots.items():
            below = list(itertools.islice(self._cache.tree.subtree(root), 1, None))
            roots.append(
                TreeRoot(
                    cache_salt=namespace.cache_salt,
                    extra_key=namespace.extra_key,
                    weights_id=namespace.weights_id,
                    num_tokens=sum(len(node.tokens) for node in below),
                    num_nodes=len(below),
                    children=self._children(root, self._message.depth),
                )
            )
        return CacheTree(
            call_id=self._message.call_id,
            roots=tuple(roots),
            generation=self._cache.generation,
            is_cut=self._is_cut,
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
