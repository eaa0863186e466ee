"""Copies of pages from storage to the host, for requests that have just arrived."""

import math
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from headwater.cache.namespace import Namespace, Scope
from headwater.cache.page_pool import PageIds
from headwater.messages.base import TokenIds
from headwater.storage.page_key import PageKey


class Await(Enum):
    """The part of a prefetch that a request waits for before it may start."""

    NOTHING = 0
    GENERATIONS = 1  # pages computed before these are known can never be stored
    PAGES = 2


@dataclass(slots=True, eq=False)
class Prefetch:
    """One sequence of pages, looked up and then read in batches. Several requests may wait for it.

    Without tokens it only asks for the generations of a namespace that is new here.
    """

    namespace: Namespace
    tokens: TokenIds  # from the start of the sequence, whole pages
    first_page: int  # the pages before it are on the device or the host
    started_s: float
    awaits: Await = Await.PAGES
    awaited_until_s: float = math.inf
    wait_until_s: float | None = None  # reading stops here; pages already read stay
    generations: tuple[int, ...] | None = None
    keys: list[PageKey] = field(default_factory=list)  # those that the store reported to have
    num_read: int = 0
    num_attached: int = 0  # pages that were attached to the tree
    pages: PageIds | None = None  # destination of the batch in flight
    is_stopped: bool = False
    is_dropped: bool = False  # its pages were retired
    is_done: bool = False

    def is_awaited(self, now_s: float) -> bool:
        """Whether the requests that wait for it should not start yet."""
        if self.is_done or self.is_stopped or now_s >= self.awaited_until_s:
            return False
        return self.awaits is Await.PAGES or (self.awaits is Await.GENERATIONS and self.generations is None)

    def covers(self, namespace: Namespace, tokens: TokenIds, *, first_page: int) -> bool:
        """Whether this prefetch also brings the next pages of `tokens`; never after a retirement of its pages."""
        if self.is_dropped or self.is_stopped or self.namespace != namespace or self.first_page != first_page:
            return False
        common = min(len(self.tokens), len(tokens))
        return common > 0 and np.array_equal(self.tokens[:common], tokens[:common])

    def retire(self, scope: Scope, page_size: int) -> bool:
        """Drop the prefetch if `scope` covers any of its pages; returns whether it does."""
        if self.is_dropped or not scope.has_namespace(self.namespace):
            return False
        limit = scope.limit_for(self.tokens, page_size)
        if limit is None or limit >= len(self.tokens) // page_size:
            return False
        self.is_dropped = True
        return True
