"""A lease: one request's hold on KV pages."""

from dataclasses import dataclass

import numpy as np

from headwater.cache.page_pool import PageIds
from headwater.cache.radix_tree import Node, Run
from headwater.cache.retirement import Retirement
from headwater.messages.base import TokenIds

NO_LIMIT = 2**31 - 1
_NO_PAGES = np.empty(0, dtype=np.int32)


class TokenSequence:
    """Prompt and generated tokens. Tokens are only appended, so views stay valid."""

    __slots__ = ("_buffer", "length")

    def __init__(self, token_ids: TokenIds) -> None:
        self.length = len(token_ids)
        self._buffer = np.array(token_ids, dtype=np.int32)

    def __len__(self) -> int:
        return self.length

    @property
    def newest(self) -> int:
        return int(self._buffer[self.length - 1])

    def append(self, token_id: int) -> None:
        if self.length == len(self._buffer):
            grown = np.empty(max(64, self.length * 3 // 2), dtype=np.int32)
            grown[: self.length] = self._buffer
            self._buffer = grown
        self._buffer[self.length] = token_id
        self.length += 1

    def view(self, start: int = 0, stop: int | None = None) -> TokenIds:
        """Tokens [start, stop) without a copy. int32[stop - start]."""
        return self._buffer[start : self.length if stop is None else min(stop, self.length)]


@dataclass(frozen=True, slots=True)
class PagePart:
    """The first tokens of a page in the tree, which a lease copies into its first private page."""

    run: Run  # pinned with its chain; a split may move `page` to the run above it
    page: int
    num_tokens: int


class Lease:
    """Pins on a path of the tree, and the private pages that follow it.

    Made and changed by `PrefixCache` only. `tokens` is the sequence of the request, which appends to it.
    """

    __slots__ = (
        "generations",
        "is_released",
        "node",
        "num_matched_pages",
        "num_private",
        "num_shared_pages",
        "part",
        "private",
        "publish_limit",
        "retirements",
        "root",
        "run",
        "superseded",
        "tokens",
    )

    def __init__(self, *, root: Node, tokens: TokenSequence, publish_limit: int) -> None:
        self.root = root
        self.tokens = tokens
        self.node = root  # the lower end of the pinned path
        self.run: Run | None = None  # its device run; None at the root
        self.num_matched_pages = 0  # shared when the lease was acquired: the cache hit
        self.num_shared_pages = 0
        self.part: PagePart | None = None  # until the step that copies it has ended
        self.private: PageIds = _NO_PAGES  # capacity may exceed num_private
        self.num_private = 0
        self.publish_limit = publish_limit  # pages from this index on are never published
        self.superseded: list[PageIds] = []  # its copies of pages that the tree had already, until no step reads them
        self.retirements: list[Retirement] = []  # those that lowered publish_limit; they wait for the release
        self.is_released = False
        # The store's counters when the lease was acquired. Its pages are never stored under later counters.
        self.generations: tuple[int, ...] | None = None

    @property
    def num_pages(self) -> int:
        return self.num_shared_pages + self.num_private

    def page_table(self) -> PageIds:
        """Page ids in the order of the sequence. int32[num_pages], a copy."""
        shared = [] if self.run is None else [run.pages for run in self.run.chain()][::-1]
        return np.concatenate([*shared, self.private[: self.num_private]]).astype(np.int32)

    def add_private(self, pages: PageIds) -> None:
        needed = self.num_private + len(pages)
        if needed > len(self.private):
            grown = np.empty(max(8, needed, len(self.private) * 3 // 2), dtype=np.int32)
            grown[: self.num_private] = self.private[: self.num_private]
            self.private = grown
        self.private[self.num_private : needed] = pages
        self.num_private = needed

    def take_private(self, num_pages: int) -> PageIds:
        """Remove and return the first `num_pages` private pages."""
        taken = self.private[:num_pages].copy()
        self.private = self.private[num_pages:]
        self.num_private -= num_pages
        return taken
