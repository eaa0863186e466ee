"""From namespaces and token paths to the names of pages in storage."""

from dataclasses import replace
from typing import TypeVar

from headwater.cache.namespace import Namespace, Scope
from headwater.cache.radix_tree import Node, RadixTree
from headwater.storage.page_key import (
    Bucket,
    Fingerprint,
    PageKey,
    chain_hashes,
    namespace_id,
    page_keys,
    scope_id,
    scope_ids,
)

Generations = tuple[int, ...]
_Name = TypeVar("_Name")
_MAX_KEPT = 4096  # namespaces; there may be many salts


class StorageNames:
    """The names of one model's pages on one rank. The namespace identifies the weights."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        self._fingerprint = fingerprint
        self._domain = fingerprint.scope_domain()
        self._seeds: dict[Namespace, bytes] = {}  # every lookup and write needs one
        self._scopes: dict[Namespace, tuple[bytes, ...]] = {}
        self._buckets: dict[Namespace, Bucket] = {}  # of the newest generations

    def seed(self, namespace: Namespace) -> bytes:
        """The start of a namespace's chain of hashes."""
        found = self._seeds.get(namespace)
        if found is None:
            found = namespace_id(
                replace(self._fingerprint, weights_id=namespace.weights_id),
                cache_salt=namespace.cache_salt,
                extra_key=namespace.extra_key,
                adapter=namespace.adapter,
            )
            _keep(self._seeds, namespace, found)
        return found

    def scopes(self, namespace: Namespace) -> tuple[bytes, ...]:
        """The ids of the counters that a namespace depends on."""
        found = self._scopes.get(namespace)
        if found is None:
            found = scope_ids(self._domain, cache_salt=namespace.cache_salt, extra_key=namespace.extra_key)
            _keep(self._scopes, namespace, found)
        return found

    def scope(self, scope: Scope) -> bytes:
        """The id of the counter that a flush of `scope` raises."""
        return scope_id(self._domain, cache_salt=scope.cache_salt, extra_key=scope.extra_key)

    def bucket(self, namespace: Namespace, generations: Generations) -> Bucket:
        found = self._buckets.get(namespace)
        if found is None or found.generations != generations:
            found = Bucket.of(self.seed(namespace), scope_ids=self.scopes(namespace), generations=generations)
            _keep(self._buckets, namespace, found)
        return found

    def hashes(self, tree: RadixTree, node: Node) -> list[bytes]:
        """The chain hashes of a node's pages. Computed once, together with those of the nodes above."""
        path: list[Node] = []
        above: Node | None = node
        while above is not None and above.hashes is None and not above.is_root:
            path.append(above)
            above = above.parent
        last = above.hashes[-1] if above is not None and above.hashes else self.seed(node.namespace)
        for each in reversed(path):
            each.hashes = chain_hashes(last, each.tokens, tree.page_size)
            last = each.hashes[-1]
        assert node.hashes is not None
        return node.hashes

    def keys(self, tree: RadixTree, node: Node, generations: Generations) -> list[PageKey]:
        """Names of a node's pages in the store, under `generations`."""
        hashes = self.hashes(tree, node)
        first_depth = tree.depth(node) - len(hashes)
        return page_keys(self.bucket(node.namespace, generations), hashes, first_depth=first_depth)


def _keep(kept: dict[Namespace, _Name], namespace: Namespace, name: _Name) -> None:
    if len(kept) >= _MAX_KEPT:
        kept.clear()
    kept[namespace] = name
