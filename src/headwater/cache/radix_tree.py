"""The prefix tree: from namespace and tokens to nodes with a run of pages per tier. No I/O, no clock.

Sequences are cut into pages of `page_size` tokens, and a node holds whole pages. So any two children of a node differ
in their first page, whose bytes are their key. A comparison takes one numpy call a node.

A run is the pages of one node on one tier, with the number of pins on them. Runs of a tier form chains of their own
(`Run.parent`), which a lease walks to unpin. Cutting a run out of the tree leaves its chain as it was, so a lease never
needs to know whether its runs are still in the tree.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from headwater.cache.namespace import Namespace, Tier
from headwater.cache.page_pool import PageIds
from headwater.cache.retirement import Retirement
from headwater.cache.statistics.residency import Stay
from headwater.messages.base import TokenIds

_NUM_SIBLINGS = 256  # children that are compared with a prompt, so that a node with thousands costs no more


class Run:
    """The pages of one node on one tier, with the number of pins on them."""

    __slots__ = (
        "arrival",
        "generations",
        "is_retired",
        "is_stored",
        "node",
        "pages",
        "parent",
        "pins",
        "retirement",
        "stay",
        "tier",
    )

    def __init__(self, *, node: "Node", tier: Tier, pages: PageIds, parent: "Run | None", pins: int) -> None:
        self.node = node
        self.tier = tier
        self.pages = pages
        self.parent = parent
        self.pins = pins
        self.is_retired = False
        # The store's counters when its pages were computed, wherever they were copied since; None: not known. The
        # pages are never stored under later counters.
        self.generations: tuple[int, ...] | None = None
        self.is_stored = False  # host only: a store has acknowledged all of its pages
        self.retirement: Retirement | None = None  # of a retired run: the retirement that waits for its pages
        self.stay: Stay | None = None  # if it belongs to the sample of the metrics
        self.arrival: object | None = None  # the copy that still writes its pages; None: all have arrived

    def chain(self) -> Iterator["Run"]:
        """This run and those above it, up to the root."""
        run: Run | None = self
        while run is not None:
            above = run.parent  # read first: the caller may free the run
            yield run
            run = above


class Node:
    """A run of pages in the tree. `tokens` is int32[k * page_size]; the root of a namespace has none."""

    __slots__ = (
        "children",
        "hashes",
        "is_linked",
        "last_used",
        "namespace",
        "num_hits",
        "num_leases",
        "offload",
        "parent",
        "restore",
        "runs",
        "tokens",
        "written_back_at",
    )

    def __init__(self, *, namespace: Namespace, parent: "Node | None", tokens: TokenIds) -> None:
        self.namespace = namespace
        self.parent = parent
        self.tokens = tokens
        self.children: dict[bytes, Node] = {}
        self.runs: dict[Tier, Run] = {}
        self.last_used = 0  # tick of the tree, for LRU
        self.written_back_at = -1  # its `last_used` when it was last written back
        self.num_leases = 0  # roots only: leases acquired in this namespace
        self.num_hits = 0  # leases that found this node in the tree
        self.is_linked = True  # in the tree; a node that was cut keeps its parent link, for the leases that pin it
        self.offload: object | None = None  # the copy in flight of its device run to the host
        self.hashes: list[bytes] | None = None  # of its pages, once storage has needed them
        self.restore: object | None = None  # the restore in flight of its host run

    @property
    def is_root(self) -> bool:
        return self.parent is None


class RadixTree:
    """The trees of all namespaces. Owns the nodes; the caller manages pages and pins."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.roots: dict[Namespace, Node] = {}
        self.tick = 0

    def root(self, namespace: Namespace) -> Node:
        """The root of `namespace`, created if there is none."""
        node = self.roots.get(namespace)
        if node is None:
            node = Node(namespace=namespace, parent=None, tokens=np.empty(0, dtype=np.int32))
            self.roots[namespace] = node
        return node

    def drop_root_if_unused(self, root: Node) -> None:
        """Drop an empty namespace that no lease can publish into any more."""
        if not root.children and not root.num_leases and self.roots.get(root.namespace) is root:
            del self.roots[root.namespace]

    def descend(self, node: Node, tokens: TokenIds) -> tuple[Node, int] | None:
        """The child of `node` that shares its first page with `tokens`, and the number of pages that they share."""
        if not node.children:
            return None
        child = node.children.get(self.key(tokens))
        return None if child is None else (child, self._num_common_pages(child.tokens, tokens))

    def match(self, root: Node, tokens: TokenIds, *, tier: Tier) -> Node:
        """The lowest node whose path is a prefix of `tokens` and wholly on `tier`. Splits a node that matches in part.

        Marks the nodes on the path as used, for LRU.
        """
        self.tick += 1
        node, position = root, 0
        while len(tokens) - position >= self.page_size:
            found = self.descend(node, tokens[position:])
            if found is None or tier not in found[0].runs:
                break
            child, num_pages = found
            if num_pages * self.page_size < len(child.tokens):
                child = self.split(child, num_pages)
            child.last_used = self.tick
            child.num_hits += 1
            node, position = child, position + len(child.tokens)
        return node

    def longest_part(
        self, node: Node, tokens: TokenIds, *, min_tokens: int, may_copy: Callable[[Node], bool]
    ) -> tuple[Node, int] | None:
        """The child of `node` whose first page begins with the most of `tokens`, and how many these are.

        None if there are fewer than `min_tokens`. Looks at the newest children that `may_copy` accepts.
        """
        wanted = self.key(tokens)
        best: Node | None = None
        num_common = min_tokens - 1
        head = wanted[: min_tokens * tokens.itemsize]
        for key, child in islice(reversed(node.children.items()), _NUM_SIBLINGS):
            if num_common >= len(tokens):
                break
            if not key.startswith(head) or not may_copy(child):
                continue
            length = min(len(tokens), self.page_size)
            differs = child.tokens[:length] != tokens[:length]
            best, num_common = child, int(differs.argmax()) if differs.any() else length
            head = wanted[: (num_common + 1) * tokens.itemsize]  # only a longer part is of interest
        return None if best is None else (best, num_common)

    def host_path(self, node: Node, tokens: TokenIds) -> list[Node]:
        """The path below `node` along `tokens`, as far as its nodes are on the host and not on the device."""
        found: list[Node] = []
        while len(tokens) >= self.page_size:
            below = self.descend(node, tokens)
            if below is None or Tier.HOST not in below[0].runs or Tier.DEVICE in below[0].runs:
                break
            child, num_common = below
            if found and (child.restore is None) != (found[0].restore is None):
                break
            if num_common * self.page_size < len(child.tokens):
                child = self.split(child, num_common)
            found.append(child)
            node, tokens = child, tokens[len(child.tokens) :]
        return found

    def add_child(self, parent: Node, tokens: TokenIds) -> Node:
        """A new node below `parent` for `tokens`, whole pages that no child of `parent` begins with."""
        key = self.key(tokens)
        assert len(tokens) % self.page_size == 0
        assert key not in parent.children
        node = Node(namespace=parent.namespace, parent=parent, tokens=tokens.copy())
        node.last_used = self.tick
        parent.children[key] = node
        return node

    def split(self, node: Node, num_pages: int) -> Node:
        """Cut `node` after `num_pages` pages and return the new *upper* node.

        `node` stays the lower end, so handles on it and on its runs keep naming the same last page. The upper runs get
        equal pins, since every pin on the lower end is a pin on the whole path.
        """
        assert node.parent is not None
        cut = num_pages * self.page_size
        assert 0 < cut < len(node.tokens)
        upper = Node(namespace=node.namespace, parent=node.parent, tokens=node.tokens[:cut])
        upper.last_used = node.last_used
        upper.written_back_at = node.written_back_at
        upper.num_hits = node.num_hits
        upper.offload = node.offload
        upper.restore = node.restore
        if node.hashes is not None:
            upper.hashes, node.hashes = node.hashes[:num_pages], node.hashes[num_pages:]
        node.parent.children[self.key(node.tokens)] = upper
        node.tokens = node.tokens[cut:]
        node.parent = upper
        upper.children[self.key(node.tokens)] = node
        for tier, run in node.runs.items():
            above = Run(node=upper, tier=tier, pages=run.pages[:num_pages], parent=run.parent, pins=run.pins)
            above.arrival = run.arrival
            above.generations = run.generations
            above.stay = None if run.stay is None else run.stay.copy()
            upper.runs[tier] = above
            run.pages = run.pages[num_pages:]
            run.parent = above
        return upper

    def prune(self, node: Node) -> None:
        """Remove `node` if it has neither runs nor children; then its parent, if that is empty as well, and so on."""
        while node.parent is not None and node.is_linked and not node.runs and not node.children:
            parent = node.parent
            del parent.children[self.key(node.tokens)]
            node.is_linked = False
            node = parent
        if node.parent is None:
            self.drop_root_if_unused(node)

    def depth(self, node: Node) -> int:
        """Pages from the root to the end of `node`."""
        num_tokens = 0
        above: Node | None = node
        while above is not None:
            num_tokens += len(above.tokens)
            above = above.parent
        return num_tokens // self.page_size

    def path(self, node: Node) -> TokenIds:
        """Tokens from the root to the end of `node`; also of a node that was cut."""
        parts: list[TokenIds] = []
        above: Node | None = node
        while above is not None:
            parts.append(above.tokens)
            above = above.parent
        return np.concatenate(parts[::-1])

    def path_to(self, node: Node) -> list[Node]:
        """The nodes from below the root down to `node`, which is the last one."""
        nodes: list[Node] = []
        above: Node | None = node
        while above is not None and not above.is_root:
            nodes.append(above)
            above = above.parent
        return nodes[::-1]

    def subtree(self, node: Node) -> Iterator[Node]:
        """`node` and all nodes below it, parents first. The tree must not change meanwhile."""
        stack = [node]
        while stack:
            current = stack.pop()
            yield current
            stack.extend(current.children.values())

    def below(self, root: Node, prefix: TokenIds, *, is_dry: bool = False) -> list[Node]:
        """The topmost nodes in the scope of `prefix`: they begin with the page that holds its last token.

        Splits a node that begins above the scope; with `is_dry` returns it whole instead.
        """
        node, position = root, 0
        first_in_scope = (len(prefix) - 1) // self.page_size * self.page_size
        while position < first_in_scope:
            found = self.descend(node, prefix[position:])
            if found is None:
                return []
            child, num_common = found
            whole_pages_wanted = (first_in_scope - position) // self.page_size
            if num_common < min(whole_pages_wanted, len(child.tokens) // self.page_size):
                return []
            if len(child.tokens) > first_in_scope - position:  # the scope begins inside this node
                rest = prefix[first_in_scope:]
                inside = child.tokens[first_in_scope - position :][: len(rest)]
                if not np.array_equal(inside, rest):
                    return []
                if not is_dry:
                    self.split(child, whole_pages_wanted)
                return [child]
            node, position = child, position + len(child.tokens)
        rest = prefix[first_in_scope:]
        return [c for c in node.children.values() if np.array_equal(c.tokens[: len(rest)], rest)]

    def key(self, tokens: TokenIds) -> bytes:
        """The key of a child: the bytes of its first page."""
        return tokens[: self.page_size].tobytes()

    def _num_common_pages(self, left: TokenIds, right: TokenIds) -> int:
        length = min(len(left), len(right)) // self.page_size * self.page_size
        if left[:length].tobytes() == right[:length].tobytes():  # the common case, and the cheapest comparison
            return length // self.page_size
        return int((left[:length] != right[:length]).argmax()) // self.page_size
