"""The map of the prefix tree: right for trees of one call, bounded for all others."""

import numpy as np
import pytest

from headwater.cache.namespace import Namespace, Tier
from headwater.cache.radix_tree import Node, RadixTree, Run
from headwater.clock import ManualClock
from headwater.engine.prefix_survey import MAX_DEPTH, PrefixSurvey
from headwater.messages.snapshot import MapNode, PrefixMap

PAGE = 4
NONE, ACME = Namespace("", "", "", "w"), Namespace("acme", "", "", "w")


@pytest.fixture
def tree() -> RadixTree:
    return RadixTree(PAGE)


@pytest.fixture
def survey(tree: RadixTree) -> PrefixSurvey:
    return PrefixSurvey(tree, ManualClock())


def add(tree: RadixTree, parent: Node, first: int, num_pages: int, *, tiers: tuple[Tier, ...] = (Tier.DEVICE,)) -> Node:
    node = tree.add_child(parent, np.arange(first, first + num_pages * PAGE, dtype=np.int32))
    for tier in tiers:
        node.runs[tier] = Run(node=node, tier=tier, pages=np.arange(num_pages), parent=parent.runs.get(tier), pins=0)
    return node


def whole(survey: PrefixSurvey, *, max_nodes: int = 100, visits: int = 10_000) -> PrefixMap:
    return survey.advance(max_nodes=max_nodes, num_first_ids=2, visits=visits)


def by_first_id(found: PrefixMap) -> dict[int, MapNode]:
    return {node.first_ids[0]: node for node in found.nodes}


def test_a_node_counts_what_is_below_it_by_tier(tree: RadixTree, survey: PrefixSurvey) -> None:
    top = add(tree, tree.root(NONE), 0, 2, tiers=(Tier.DEVICE, Tier.HOST))
    add(tree, top, 100, 3, tiers=(Tier.HOST,))
    add(tree, top, 200, 1)
    add(tree, tree.root(ACME), 300, 5)
    found = whole(survey)
    nodes = by_first_id(found)
    assert (nodes[0].num_tokens, nodes[0].below, nodes[0].device, nodes[0].host) == (8, 24, 12, 20)
    assert (nodes[100].parent, nodes[0].parent, nodes[100].depth) == (nodes[0].number, 0, 2)
    assert [(root.cache_salt, root.num_tokens, root.device, root.num_nodes) for root in found.roots] == [
        ("", 24, 12, 3),
        ("acme", 20, 20, 1),
    ]
    assert found.num_left_out == 0
    assert nodes[300].root == 1


def test_the_largest_nodes_are_shown_and_their_parents_before_them(tree: RadixTree, survey: PrefixSurvey) -> None:
    """A cut that kept a node without the one above it would leave the page a tile without a place."""
    for chain in range(30):
        node = tree.root(NONE)
        for depth in range(MAX_DEPTH + 3):
            node = add(tree, node, 1000 * chain + 100 * depth, 1 + chain % 5)
    found = whole(survey, max_nodes=40)
    seen = {0}
    for node in found.nodes:
        assert node.parent in seen
        seen.add(node.number)
    assert len(found.nodes) == 40
    assert max(node.depth for node in found.nodes) <= MAX_DEPTH
    assert found.num_left_out == 30 * (MAX_DEPTH + 3) - 40
    assert found.roots[0].num_tokens == sum((MAX_DEPTH + 3) * (1 + chain % 5) * PAGE for chain in range(30))
    assert min(node.below for node in found.nodes) >= 2 * PAGE


def test_a_call_visits_a_bounded_number_of_nodes(tree: RadixTree, survey: PrefixSurvey) -> None:
    """An engine with a large tree must not stop for a page: the walk goes on in the next call."""
    for index in range(100):
        add(tree, tree.root(NONE), 10 * index, 1)
    for _ in range(3):
        assert whole(survey, visits=30).roots == ()
    assert whole(survey, visits=30).roots[0].num_nodes == 100


def test_a_tree_that_changes_between_two_calls_does_no_harm(tree: RadixTree, survey: PrefixSurvey) -> None:
    """Cut nodes are passed over, a split and new nodes are taken as they come, and the next survey is right."""
    nodes = [add(tree, tree.root(NONE), 100 * index, 4) for index in range(20)]
    for index, node in enumerate(nodes):
        add(tree, node, 5000 + 100 * index, 1)
    whole(survey, visits=7)
    for node in nodes[:10]:
        for below in [*node.children.values(), node]:
            below.runs.clear()
            tree.prune(below)
    for node in nodes[10:15]:
        tree.split(node, 2)
    while not whole(survey, visits=7).roots:
        pass
    for _ in range(20):
        found = whole(survey, visits=7)
    assert found.roots[0].num_tokens == 10 * (4 + 1) * PAGE
    assert found.roots[0].num_nodes == 25


def test_a_number_names_a_node_as_long_as_it_is_in_the_tree(tree: RadixTree, survey: PrefixSurvey) -> None:
    kept, cut = (add(tree, tree.root(NONE), first, 1) for first in (0, 100))
    numbers = {first: node.number for first, node in by_first_id(whole(survey)).items()}
    add(tree, tree.root(NONE), 200, 5)
    assert by_first_id(whole(survey))[0].number == numbers[0]
    assert survey.node(numbers[0]) is kept
    cut.runs.clear()
    tree.prune(cut)
    assert survey.node(numbers[100]) is None
    assert survey.node(12345) is None
