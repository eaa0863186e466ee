"""From namespaces and token paths to the names of pages in storage."""

from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class StorageNames:
    """Names for one model on one rank; the weights come from the namespace."""

    fingerprint: Fingerprint

    def seed(self, namespace: Namespace) -> bytes:
        """Where the chain of hashes of a namespace begins."""
        fingerprint = replace(self.fingerprint, weights_id=namespace.weights_id)
        return namespace_id(
            fingerprint,
            cache_salt=namespace.cache_salt,
            extra_key=namespace.extra_key,
            adapter=namespace.adapter,
        )

    def scopes(self, namespace: Namespace) -> tuple[bytes, ...]:
        """The counters that a namespace depends on."""
        domain = self.fingerprint.scope_domain()
        return scope_ids(domain, cache_salt=namespace.cache_salt, extra_key=namespace.extra_key)

    def scope(self, scope: Scope) -> bytes:
        """The counter that a flush of `scope` raises."""
        domain = self.fingerprint.scope_domain()
        return scope_id(domain, cache_salt=scope.cache_salt, extra_key=scope.extra_key)

    def bucket(self, namespace: Namespace, generations: Generations) -> Bucket:
        return Bucket.of(self.seed(namespace), scope_ids=self.scopes(namespace), generations=generations)

    def hashes(self, tree: RadixTree, node: Node) -> list[bytes]:
        """The chain hashes of a node's pages; computed once, with those of the nodes above."""
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
