"""The structure of the tree: matching, splitting, and the chains that leases walk."""

import numpy as np
import pytest

from headwater.cache.namespace import Namespace, Tier
from headwater.cache.radix_tree import Node, RadixTree, Run

NS = Namespace("", "", "", "w")
PAGE = 4


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def pages_of(node: Node) -> list[int]:
    return node.runs[Tier.DEVICE].pages.tolist()


@pytest.fixture
def tree() -> RadixTree:
    return RadixTree(PAGE)


def add(tree: RadixTree, parent: Node, tokens: np.ndarray, first_page: int, pins: int = 0) -> Node:
    node = tree.add_child(parent, tokens)
    pages = np.arange(first_page, first_page + len(tokens) // PAGE, dtype=np.int32)
    above = parent.runs.get(Tier.DEVICE)
    node.runs[Tier.DEVICE] = Run(node=node, tier=Tier.DEVICE, pages=pages, parent=above, pins=pins)
    return node


def test_match_takes_whole_pages_only(tree):
    root = tree.root(NS)
    node = add(tree, root, ids(*range(8)), 0)
    assert tree.match(root, ids(0, 1, 2), tier=Tier.DEVICE) is root
    upper = tree.match(root, ids(0, 1, 2, 3, 4, 5, 99), tier=Tier.DEVICE)
    assert pages_of(upper) == [0] and pages_of(node) == [1] and node.parent is upper


def test_match_stops_where_tokens_differ_inside_a_page(tree):
    root = tree.root(NS)
    add(tree, root, ids(*range(8)), 0)
    assert pages_of(tree.match(root, ids(0, 1, 2, 3, 4, 5, 6, 99), tier=Tier.DEVICE)) == [0]


def test_match_ignores_nodes_that_the_tier_does_not_hold(tree):
    root = tree.root(NS)
    node = add(tree, root, ids(*range(4)), 0)
    node.runs[Tier.HOST] = node.runs.pop(Tier.DEVICE)
    assert tree.match(root, ids(*range(4)), tier=Tier.DEVICE) is root


def test_split_makes_a_new_upper_node_with_equal_pins(tree):
    """A lease's handle names the lower end: after a split, walking up from it must meet both halves."""
    root = tree.root(NS)
    node = add(tree, root, ids(*range(12)), 0, pins=3)
    handle = node.runs[Tier.DEVICE]
    upper = tree.split(node, 2)
    assert [run.pages.tolist() for run in handle.chain()] == [[2], [0, 1]]
    assert [run.pins for run in handle.chain()] == [3, 3]
    assert upper.parent is root and list(upper.children.values()) == [node]


def test_siblings_share_no_page(tree):
    root = tree.root(NS)
    add(tree, root, ids(0, 1, 2, 3), 0)
    add(tree, root, ids(0, 1, 2, 4), 1)
    assert len(root.children) == 2
    assert pages_of(tree.match(root, ids(0, 1, 2, 4, 5), tier=Tier.DEVICE)) == [1]


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (range(1), [[0, 1, 2]]),  # all of the first page's node
        (range(4), [[0, 1, 2]]),
        (range(5), [[1, 2]]),  # the second page holds token 4
        (range(8), [[1, 2]]),
        (range(9), [[2]]),
        (range(12), [[2]]),
        (range(13), [[10], [20]]),  # below the node: both children go on like the prefix
        ([*list(range(12)), 12, 13, 14, 15], [[10]]),
        ([*list(range(12)), 99], []),
        ([0, 1, 99], []),
        ([*list(range(12)), 12, 13, 14, 15, 16], []),  # nobody has that page yet
    ],
)
def test_below_finds_the_page_of_the_prefixs_last_token(tree, prefix, expected):
    root = tree.root(NS)
    node = add(tree, root, ids(*range(12)), 0)
    add(tree, node, ids(12, 13, 14, 15), 10)
    add(tree, node, ids(12, 13, 14, 99), 20)
    found = tree.below(root, ids(*prefix))
    assert [pages_of(each) for each in found] == expected


def test_below_changes_nothing_in_a_dry_run(tree):
    root = tree.root(NS)
    node = add(tree, root, ids(*range(12)), 0)
    assert tree.below(root, ids(*range(6)), is_dry=True) == [node]
    assert pages_of(node) == [0, 1, 2]


def test_empty_namespaces_are_forgotten_once_no_lease_needs_them(tree):
    root = tree.root(NS)
    root.num_leases = 1
    tree.drop_root_if_unused(root)
    assert NS in tree.roots
    root.num_leases = 0
    tree.drop_root_if_unused(root)
    assert NS not in tree.roots


def test_both_halves_of_a_split_node_keep_what_was_known_of_it(tree):
    """Each half that forgot would be copied again, evicted too early, never stored, or read before it has arrived."""
    root = tree.root(Namespace("", "", "", "w"))
    node = add(tree, root, ids(*range(12)), first_page=0)
    node.last_used, node.written_back_at, node.num_hits = 7, 5, 3
    node.offload, node.restore, node.hashes = object(), object(), [b"a", b"b", b"c"]
    node.runs[Tier.DEVICE].arrival, node.runs[Tier.DEVICE].generations = object(), (1, 2)
    upper = tree.split(node, 2)
    for name in ("last_used", "written_back_at", "num_hits", "offload", "restore", "namespace"):
        assert getattr(upper, name) == getattr(node, name), name
    assert (upper.hashes, node.hashes) == ([b"a", b"b"], [b"c"])
    assert upper.runs[Tier.DEVICE].arrival is node.runs[Tier.DEVICE].arrival is not None
    assert upper.runs[Tier.DEVICE].generations == node.runs[Tier.DEVICE].generations == (1, 2)
