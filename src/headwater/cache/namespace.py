"""Namespaces keep caches apart; a scope selects the part of the cache that an operation covers."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from headwater.messages.base import TokenIds

UNLOADED = "unloaded"  # as the adapter of a scope: a content that no namespace has, since contents are hexadecimal


class Tier(IntEnum):
    """Where a page lives. Storage is asked by key and has no pages in the tree."""

    DEVICE = 0
    HOST = 1
    STORAGE = 2


class Namespace(NamedTuple):
    """A separate root of the prefix tree: pages never match across namespaces, on any tier."""

    cache_salt: str
    extra_key: str
    adapter: str
    weights_id: str


@dataclass(frozen=True, slots=True)
class Scope:
    """The part of the cache to retire. None means all; `prefix` limits it to token paths that begin with it."""

    cache_salt: str | None = None
    extra_key: str | None = None
    other_than_weights_id: str | None = None  # only the namespaces of other weights
    adapter: str | None = None  # its content; "" is the base model alone
    prefix: TokenIds | None = None  # int32[n], n >= 1
    tiers: frozenset[Tier] = frozenset(Tier)

    @property
    def is_everything(self) -> bool:
        """Whether it covers everything on its tiers."""
        narrowed = (self.cache_salt, self.extra_key, self.other_than_weights_id, self.adapter, self.prefix)
        return all(part is None for part in narrowed)

    def has_namespace(self, namespace: Namespace) -> bool:
        return (
            (self.cache_salt is None or self.cache_salt == namespace.cache_salt)
            and (self.extra_key is None or self.extra_key == namespace.extra_key)
            and (self.adapter is None or self.adapter == namespace.adapter)
            and self.other_than_weights_id != namespace.weights_id
        )

    def first_page(self, page_size: int) -> int:
        """Index of the first page in scope: the one that holds the prefix's last token."""
        return 0 if self.prefix is None else (len(self.prefix) - 1) // page_size

    def limit_for(self, tokens: TokenIds, page_size: int) -> int | None:
        """How many leading pages of a sequence `tokens` lie outside the scope; None: all of them.

        A sequence that has begun the page of the prefix's last token counts as inside, even if it is still shorter
        than the prefix: its tokens in that page were computed before the retirement.
        """
        first = self.first_page(page_size)
        if self.prefix is None:
            return first
        common = min(len(tokens), len(self.prefix))
        if common <= first * page_size or not np.array_equal(tokens[:common], self.prefix[:common]):
            return None
        return first
