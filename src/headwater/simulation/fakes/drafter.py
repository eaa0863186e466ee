"""Drafts for simulated engines: by chance, or by the real drafters under a check."""

import random
from collections.abc import Callable
from typing import Literal

import numpy as np

from headwater.cache.radix_tree import Node, RadixTree
from headwater.messages.base import TokenIds
from headwater.scheduling.request import Request
from headwater.scheduling.speculation.drafters import Drafter, NgramDrafter, TreeDrafter
from headwater.scheduling.speculation.drafting import Drafting, Source
from headwater.simulation.checks.violation import demand

_SOURCES = (Source.SHORT_SUFFIX, Source.LONG_SUFFIX, Source.TREE)


class FakeDrafter:
    """Drafts right tokens up to a place drawn for each draft. An oracle sets `right_tokens`, which knows them."""

    def __init__(self, *, seed: int, vocab_size: int) -> None:
        self.right_tokens: Callable[[Request, int], list[int]] = lambda request, count: []
        self._chance = random.Random(seed)
        self._rate = self._chance.choice([0.3, 0.7, 0.95])
        self._vocab_size = vocab_size

    def draft(self, request: Request, drafting: Drafting, most: int) -> tuple[TokenIds, Source]:
        count = self._chance.randrange(most + 1)
        tokens = self.right_tokens(request, count)
        is_right = True
        for place in range(count):
            is_right = is_right and self._chance.random() < self._rate and place < len(tokens)
            if not is_right:
                tokens[place : place + 1] = [self._chance.randrange(self._vocab_size)]
        return np.array(tokens, dtype=np.int32), self._chance.choice(_SOURCES) if count else Source.NONE


class CheckedTreeDrafter:
    """The drafter of a tree. What it finds there must be text of the request's own namespace."""

    def __init__(self) -> None:
        self.tree: RadixTree | None = None  # of the engine, once it is there
        self.num_from_tree = 0  # drafts
        self._drafter: TreeDrafter | None = None

    def draft(self, request: Request, drafting: Drafting, most: int) -> tuple[TokenIds, Source]:
        assert self.tree is not None and request.lease is not None
        self._drafter = self._drafter or TreeDrafter(self.tree)
        namespace = request.lease.root.namespace
        tokens, source = self._drafter.draft(request, drafting, most)
        is_own = drafting.node is None or drafting.node.namespace == namespace
        demand(is_own, "drafts_stay_in_their_namespace", f"{request.rid} looks for drafts at others'")
        if source is Source.TREE:
            self.num_from_tree += 1
            text = np.concatenate((request.tokens.view(), tokens))
            root = self.tree.roots.get(namespace)
            is_own = root is not None and _has_text(root, text)
            demand(is_own, "drafts_stay_in_their_namespace", f"{request.rid} is drafted text of others")
        return tokens, source


def make_drafter(kind: Literal["none", "fake", "ngram", "tree"], *, seed: int, vocab_size: int) -> Drafter | None:
    """The drafter of an engine of this shape; None without speculation."""
    if kind == "none":
        return None
    if kind == "fake":
        return FakeDrafter(seed=seed, vocab_size=vocab_size)
    return NgramDrafter() if kind == "ngram" else CheckedTreeDrafter()


def _has_text(node: Node, text: TokenIds) -> bool:
    """Whether a path below `node` begins with `text`."""
    if not len(text):
        return True
    below = ((child, min(len(child.tokens), len(text))) for child in node.children.values())
    return any(
        np.array_equal(child.tokens[:length], text[:length]) and _has_text(child, text[length:])
        for child, length in below
    )
