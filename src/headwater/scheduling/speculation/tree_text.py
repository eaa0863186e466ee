"""How texts of the prefix tree go on after the text of a request."""

from itertools import islice

import numpy as np

from headwater.cache.radix_tree import Node, RadixTree
from headwater.messages.base import TokenIds
from headwater.scheduling.request import Request
from headwater.scheduling.speculation.drafting import Drafting

_NUM_CHILDREN = 16  # of a node that are compared, the newest ones


class TreeText:
    """Follows requests through the tree: what earlier answers said after the same text.

    It reads the request's own namespace and nothing else, so drafts show no tenant what another has asked. Tiers do
    not matter: the tokens are in the tree, and no KV is read.
    """

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree

    def next_tokens(self, request: Request, drafting: Drafting, most: int) -> TokenIds:
        """At most `most` tokens that follow the request's text in the tree. int32[n]; none if it is not there."""
        node = self._follow(request, drafting)
        if node is None:
            return request.tokens.view(0, 0)
        found: list[TokenIds] = []
        num_found, rest = 0, request.tokens.view(drafting.num_in_node)
        while num_found < most and (child := self._newest_child(node, rest)) is not None:
            found.append(child.tokens[len(rest) : len(rest) + most - num_found])
            num_found += len(found[-1])
            node, rest = child, rest[:0]
        return np.concatenate(found) if found else rest[:0]

    def _follow(self, request: Request, drafting: Drafting) -> Node | None:
        """The last node that lies whole on the request's text. It is where it was, or further down."""
        assert request.lease is not None
        root = self._tree.roots.get(request.lease.root.namespace)
        if root is None:
            return None
        if drafting.node is None or not _is_below(drafting.node, root):  # cut, evicted, or of other weights
            drafting.node, drafting.num_in_node = root, 0
        while True:
            rest = request.tokens.view(drafting.num_in_node)
            found = self._tree.descend(drafting.node, rest) if len(rest) >= self._tree.page_size else None
            if found is None or found[1] * self._tree.page_size < len(found[0].tokens):
                return drafting.node
            drafting.node = found[0]
            drafting.num_in_node += len(found[0].tokens)

    def _newest_child(self, node: Node, rest: TokenIds) -> Node | None:
        """The child used last among those that begin with `rest` and go on."""
        head = self._tree.key(rest)
        newest: Node | None = None
        for key, child in islice(reversed(node.children.items()), _NUM_CHILDREN):
            if not key.startswith(head) or (newest is not None and child.last_used <= newest.last_used):
                continue
            if len(child.tokens) > len(rest) and np.array_equal(child.tokens[: len(rest)], rest):
                newest = child
        return newest


def _is_below(node: Node, root: Node) -> bool:
    """Whether the tree still has `node` below `root`."""
    return node is root or (node.parent is not None and node.is_linked and node.namespace == root.namespace)
