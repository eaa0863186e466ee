"""The prefix tree: from namespace and tokens to nodes with a run of pages per tier. No I/O, no clock.

Sequences are cut into pages of `page_size` tokens, and a node holds whole pages, so two children of a node
differ in their first page and are told apart by its bytes. Comparing is one numpy call a node.

A run is the pages of one node on one tier and the number of leases that pin them. Runs of a tier form
chains of their own (`Run.parent`), which a lease walks to unpin. Cutting a run out of the tree leaves its
chain as it was: that is why a lease never needs to know whether what it pins is still in the tree.
"""

from collections.abc import Iterator

import numpy as np

from headwater.cache.namespace import Namespace, Tier
from headwater.cache.page_pool import PageIds
from headwater.cache.retirement import Retirement
from headwater.messages.base import TokenIds


class Run:
    """The pages of one node on one tier, with the number of pins on them."""

    __slots__ = ("arrival", "is_retired", "node", "pages", "parent", "pins", "retirement", "tier")

    def __init__(self, *, node: "Node", tier: Tier, pages: PageIds, parent: "Run | None", pins: int) -> None:
        self.node = node
        self.tier = tier
        self.pages = pages
        self.parent = parent
        self.pins = pins
        self.is_retired = False
        self.retirement: Retirement | None = None  # who waits for the pages of a retired run
        self.arrival: object | None = None  # the copy that still writes its pages; None: all is there

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
        "generations",
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
        self.is_linked = True  # in the tree; a node that was cut keeps its parent link, for those that pin it
        self.offload: object | None = None  # the copy of its device run to the host that is in flight
        self.hashes: list[bytes] | None = None  # of its pages, once storage asked for them
        # What the store's counters were when its pages were computed: they are never stored under later ones.
        self.generations: tuple[int, ...] | None = None
        self.restore: object | None = None  # the load that brings its host run to the device

    @property
    def is_root(self) -> bool:
        return self.parent is None


class RadixTree:
    """All namespaces' trees. Owns nodes; pages and pins are its caller's business."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.roots: dict[Namespace, Node] = {}
        self.tick = 0

    def root(self, namespace: Namespace) -> Node:
        """The root of `namespace`, made if there is none."""
        node = self.roots.get(namespace)
        if node is None:
            node = Node(namespace=namespace, parent=None, tokens=np.empty(0, dtype=np.int32))
            self.roots[namespace] = node
        return node

    def drop_root_if_unused(self, root: Node) -> None:
        """Forget an empty namespace that no lease can publish into any more."""
        if not root.children and not root.num_leases and self.roots.get(root.namespace) is root:
            del self.roots[root.namespace]

    def descend(self, node: Node, tokens: TokenIds) -> tuple[Node, int] | None:
        """The child of `node` that shares at least one page with `tokens`, and how many pages it shares."""
        if not node.children:
            return None
        child = node.children.get(self.key(tokens))
        return None if child is None else (child, self._num_common_pages(child.tokens, tokens))

    def match(self, root: Node, tokens: TokenIds, *, tier: Tier) -> Node:
        """The lowest node whose path is a prefix of `tokens`, wholly on `tier`; splits where they part.

        Touches the nodes on the way for LRU.
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

    def host_path(self, node: Node, tokens: TokenIds) -> list[Node]:
        """The nodes below `node` that continue it along `tokens` on the host and not on the device."""
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

        `node` stays the lower end, so handles on it and on its runs keep naming the same last page; the
        upper runs get equal pins, since whoever pins the lower end pins the whole path.
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
        upper.generations = node.generations
        if node.hashes is not None:
            upper.hashes, node.hashes = node.hashes[:num_pages], node.hashes[num_pages:]
        node.parent.children[self.key(node.tokens)] = upper
        node.tokens = node.tokens[cut:]
        node.parent = upper
        upper.children[self.key(node.tokens)] = node
        for tier, run in node.runs.items():
            above = Run(node=upper, tier=tier, pages=run.pages[:num_pages], parent=run.parent, pins=run.pins)
            above.arrival = run.arrival
            upper.runs[tier] = above
            run.pages = run.pages[num_pages:]
            run.parent = above
        return upper

    def prune(self, node: Node) -> None:
        """Remove `node` if no tier holds it and nothing hangs below it, and so on upwards."""
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
        """`node` and everything below it, parents first. The tree must not change meanwhile."""
        stack = [node]
        while stack:
            current = stack.pop()
            yield current
            stack.extend(current.children.values())

    def below(self, root: Node, prefix: TokenIds, *, is_dry: bool = False) -> list[Node]:
        """The nodes that begin with the page holding the last token of `prefix`, splitting where needed.

        With `is_dry` nothing is split: a node that begins earlier is returned whole.
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
        """What tells children apart: the bytes of the first page."""
        return tokens[: self.page_size].tobytes()

    def _num_common_pages(self, left: TokenIds, right: TokenIds) -> int:
        length = min(len(left), len(right)) // self.page_size * self.page_size
        if left[:length].tobytes() == right[:length].tobytes():  # as mostly, and told fastest
            return length // self.page_size
        return int((left[:length] != right[:length]).argmax()) // self.page_size
