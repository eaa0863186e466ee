"""A map of the prefix tree, whatever its size: a walk that goes on from one call to the next.

A call visits a bounded number of nodes, so a step never waits long for it. The tree may change between two calls. Nodes
that are cut meanwhile are passed over, and a node that is split may be counted twice or not at all: the next survey is
right again. A tree that fits into one call is always shown as it is.
"""

import heapq
import itertools
from collections.abc import Iterator

from headwater.cache.namespace import Namespace, Tier
from headwater.cache.radix_tree import Node, RadixTree
from headwater.clock import Clock
from headwater.messages.snapshot import MapNode, MapRoot, PrefixMap

VISITS = 4000  # nodes in a call: 3 to 4 ms
MAX_DEPTH = 6  # of the nodes on the map
_MAX_CHILDREN = 64  # that a node has on the map


class _Tile:
    """A node during the survey, with the sums over all below it."""

    __slots__ = ("below", "children", "device", "host", "node", "num_nodes", "rest")

    def __init__(self, node: Node) -> None:
        self.node = node
        num_tokens = len(node.tokens)
        self.below = num_tokens
        self.device = num_tokens if Tier.DEVICE in node.runs else 0
        self.host = num_tokens if Tier.HOST in node.runs else 0
        self.num_nodes = 1
        self.children: list[_Tile] = []
        self.rest = list(node.children.values())  # not visited yet

    def add(self, child: "_Tile", *, is_shown: bool) -> None:
        self.below += child.below
        self.device += child.device
        self.host += child.host
        self.num_nodes += child.num_nodes
        if is_shown:
            self.children.append(child)
            if len(self.children) > 2 * _MAX_CHILDREN:
                self.children = _largest(self.children, _MAX_CHILDREN)


class PrefixSurvey:
    """Keeps the last complete map, and the walk that makes the next one."""

    def __init__(self, tree: RadixTree, clock: Clock) -> None:
        self._tree = tree
        self._clock = clock
        self._walk: Iterator[None] | None = None
        self._began_s = 0.0
        self._found: list[tuple[Namespace, _Tile]] = []
        self._numbers: dict[Node, int] = {}  # of the nodes on the last map
        self._next_number = itertools.count(1)
        self._map = PrefixMap(roots=(), nodes=(), num_left_out=0, taken_s=0.0)

    def advance(self, *, max_nodes: int, num_first_ids: int, visits: int = VISITS) -> PrefixMap:
        """Visit up to `visits` nodes. Returns the newest complete map, of `max_nodes` nodes at most."""
        if self._walk is None:
            self._found, self._began_s = [], self._clock.now()
            self._walk = self._visit_all()
        if sum(1 for _ in itertools.islice(self._walk, visits)) < visits:
            self._walk = None
            self._take(max_nodes, num_first_ids)
        return self._map

    def node(self, number: int) -> Node | None:
        """The node that the last map shows under `number`, if it is still in the tree."""
        node = next((node for node, known in self._numbers.items() if known == number), None)
        return node if node is not None and node.is_linked else None

    def _visit_all(self) -> Iterator[None]:
        """Yields once for each node."""
        for namespace, root in list(self._tree.roots.items()):
            tile = _Tile(root)
            yield from _visit_below(tile)
            self._found.append((namespace, tile))

    def _take(self, max_nodes: int, num_first_ids: int) -> None:
        shown = [
            (tile, parent, depth, index)
            for index, (_, root) in enumerate(self._found)
            for tile, parent, depth in _tiles_below(root)
        ]
        shown = heapq.nsmallest(max_nodes, shown, key=lambda each: (-each[0].below, each[2]))  # parents come first
        numbers = {tile.node: self._numbers.get(tile.node) or next(self._next_number) for tile, *_ in shown}
        nodes = tuple(
            MapNode(
                number=numbers[tile.node],
                root=index,
                parent=numbers.get(parent.node, 0),
                depth=depth,
                num_tokens=len(tile.node.tokens),
                below=tile.below,
                device=tile.device,
                host=tile.host,
                num_hits=tile.node.num_hits,
                num_pins=tile.node.runs[Tier.DEVICE].pins if Tier.DEVICE in tile.node.runs else 0,
                first_ids=tuple(tile.node.tokens[:num_first_ids].tolist()),
            )
            for tile, parent, depth, index in shown
        )
        roots = tuple(_root(namespace, tile) for namespace, tile in self._found)
        num_left_out = sum(root.num_nodes for root in roots) - len(nodes)
        taken_s = self._clock.now() - self._began_s
        self._map = PrefixMap(roots=roots, nodes=nodes, num_left_out=num_left_out, taken_s=taken_s)
        self._numbers, self._found = numbers, []


def _visit_below(root: _Tile) -> Iterator[None]:
    """Sum up all below `root`. Yields once for each node, when those below it have been visited."""
    path = [root]
    while True:
        tile = path[-1]
        if tile.rest:
            child = tile.rest.pop()
            if child.is_linked:
                path.append(_Tile(child))
            continue
        path.pop()
        if not path:
            return
        path[-1].add(tile, is_shown=len(path) <= MAX_DEPTH)
        yield


def _largest(tiles: list[_Tile], count: int) -> list[_Tile]:
    return heapq.nlargest(count, tiles, key=lambda tile: tile.below)


def _tiles_below(root: _Tile) -> Iterator[tuple[_Tile, _Tile, int]]:
    """Each tile below `root` with its parent and its depth."""
    stack = [(root, 1)]
    while stack:
        above, depth = stack.pop()
        for tile in _largest(above.children, _MAX_CHILDREN):
            yield tile, above, depth
            stack.append((tile, depth + 1))


def _root(namespace: Namespace, tile: _Tile) -> MapRoot:
    return MapRoot(
        cache_salt=namespace.cache_salt,
        extra_key=namespace.extra_key,
        weights_id=namespace.weights_id,
        num_tokens=tile.below,
        device=tile.device,
        host=tile.host,
        num_nodes=tile.num_nodes - 1,
    )
