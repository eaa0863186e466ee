"""A map of the prefix tree, whatever its size: a walk that goes on from one call to the next.

A call visits a bounded number of nodes, so a step never waits long for it. The tree may change between two calls. Nodes
that are cut meanwhile are passed over, and a node that is split may be counted twice or not at all: the next survey is
right again. A tree that fits into one call is always shown as it is.
"""

import itertools
from heapq import heappush, heappushpop

from headwater.cache.namespace import Namespace, Tier
from headwater.cache.radix_tree import Node, RadixTree
from headwater.clock import Clock
from headwater.messages.snapshot import MapNode, MapRoot, PrefixMap

VISITS = 2000  # nodes in a call: 2 to 5 ms
MAX_DEPTH = 12  # of the nodes on the map


class _Sum:
    """A node whose descendants are being visited, with the sums over those that have been."""

    __slots__ = ("below", "device", "host", "node", "num_nodes", "rest")

    def __init__(self, node: Node, num_tokens: int) -> None:
        self.node = node
        self.rest = list(node.children.values())  # not visited yet
        self.below = num_tokens
        self.device = num_tokens if Tier.DEVICE in node.runs else 0
        self.host = num_tokens if Tier.HOST in node.runs else 0
        self.num_nodes = 1


class _Walk:
    """One survey. Keeps sums for the nodes above the current one, and the `max_nodes` largest of those behind it."""

    def __init__(self, tree: RadixTree, max_nodes: int, began_s: float) -> None:
        self.began_s = began_s
        self.max_nodes = max_nodes
        self.roots: list[tuple[Namespace, _Sum]] = []
        # (tokens with all below, -depth, a number that no other has, node, of these on the device, on the host): a
        # parent is never smaller than its child, so it is here if its child is
        self.largest: list[tuple[int, int, int, Node, int, int]] = []
        self._waiting = list(tree.roots.items())
        self._path: list[_Sum] = []
        self._numbers = itertools.count()

    def go_on(self, num_visits: int) -> bool:
        """Visit so many nodes. Returns whether all have been visited."""
        path = self._path
        while True:
            if not path:
                if not self._waiting:
                    return True
                namespace, root = self._waiting.pop(0)
                path.append(_Sum(root, 0))
                self.roots.append((namespace, path[0]))
            above = path[-1]
            while above.rest:
                if num_visits <= 0:
                    return False
                num_visits -= 1
                node = above.rest.pop()
                if not node.is_linked:
                    continue
                num_tokens = len(node.tokens)
                if node.children:
                    above = _Sum(node, num_tokens)
                    path.append(above)
                    continue
                on_device = num_tokens if Tier.DEVICE in node.runs else 0
                on_host = num_tokens if Tier.HOST in node.runs else 0
                self._add(above, node, num_tokens, on_device, on_host, 1)
            path.pop()
            if path:
                self._add(path[-1], above.node, above.below, above.device, above.host, above.num_nodes)

    def _add(self, above: _Sum, node: Node, below: int, device: int, host: int, num_nodes: int) -> None:
        above.below += below
        above.device += device
        above.host += host
        above.num_nodes += num_nodes
        depth, largest = len(self._path), self.largest
        if depth > MAX_DEPTH or (len(largest) >= self.max_nodes and below < largest[0][0]):
            return
        entry = (below, -depth, next(self._numbers), node, device, host)
        if len(largest) < self.max_nodes:
            heappush(largest, entry)
        else:
            heappushpop(largest, entry)


class PrefixSurvey:
    """Keeps the last complete map, and the walk that makes the next one."""

    def __init__(self, tree: RadixTree, clock: Clock) -> None:
        self._tree = tree
        self._clock = clock
        self._walk: _Walk | None = None
        self._nodes: dict[Node, int] = {}  # those on the last map, with their numbers
        self._next_number = itertools.count(1)
        self._map = PrefixMap(roots=(), nodes=(), num_left_out=0, taken_s=0.0)

    def advance(self, *, max_nodes: int, num_first_ids: int, visits: int = VISITS) -> PrefixMap:
        """Visit up to `visits` nodes. Returns the newest complete map, of `max_nodes` nodes at most."""
        if self._walk is None:
            self._walk = _Walk(self._tree, max_nodes, self._clock.now())
        if self._walk.go_on(visits):
            self._map = self._draw(self._walk, num_first_ids)
            self._walk = None
        return self._map

    @property
    def is_at_rest(self) -> bool:
        """Whether no survey is under way."""
        return self._walk is None

    @property
    def map(self) -> PrefixMap:
        """The newest complete one."""
        return self._map

    def node(self, number: int) -> Node | None:
        """The node that the last map shows under `number`, if it is still in the tree."""
        node = next((node for node, known in self._nodes.items() if known == number), None)
        return node if node is not None and node.is_linked else None

    def _draw(self, walk: _Walk, num_first_ids: int) -> PrefixMap:
        index_of = {namespace: index for index, (namespace, _) in enumerate(walk.roots)}
        found = sorted(walk.largest, reverse=True)  # of two as large as each other the upper one is first
        known, self._nodes = self._nodes, {}
        nodes: list[MapNode] = []
        for below, depth, _, node, device, host in found:
            number = known.get(node) or next(self._next_number)
            self._nodes[node] = number
            run = node.runs.get(Tier.DEVICE)
            assert node.parent is not None
            nodes.append(
                MapNode(
                    number=number,
                    root=index_of[node.namespace],
                    parent=self._nodes.get(node.parent, 0),
                    depth=-depth,
                    num_tokens=len(node.tokens),
                    below=below,
                    device=device,
                    host=host,
                    num_hits=node.num_hits,
                    num_pins=0 if run is None else run.pins,
                    first_ids=tuple(node.tokens[:num_first_ids].tolist()) if num_first_ids else (),
                )
            )
        roots = tuple(_root(namespace, found) for namespace, found in walk.roots)
        return PrefixMap(
            roots=roots,
            nodes=tuple(nodes),
            num_left_out=sum(root.num_nodes for root in roots) - len(nodes),
            taken_s=self._clock.now() - walk.began_s,
        )


def _root(namespace: Namespace, found: _Sum) -> MapRoot:
    return MapRoot(
        cache_salt=namespace.cache_salt,
        extra_key=namespace.extra_key,
        weights_id=namespace.weights_id,
        num_tokens=found.below,
        device=found.device,
        host=found.host,
        num_nodes=found.num_nodes - 1,
    )
