"""Pages on their way from storage to the host, for requests that have just arrived."""

from dataclasses import dataclass, field

import numpy as np

from headwater.cache.namespace import Namespace, Scope
from headwater.cache.page_pool import PageIds
from headwater.messages import TokenIds
from headwater.storage.page_key import PageKey


@dataclass(slots=True, eq=False)
class Prefetch:
    """One sequence of pages, looked up and then read in batches. Several requests may wait for it."""

    namespace: Namespace
    tokens: TokenIds  # from the start of the sequence, whole pages
    first_page: int  # those before it are on the device or the host
    started_s: float
    wait_until_s: float | None = None  # reading stops here; what was read stays
    generations: tuple[int, ...] | None = None
    keys: list[PageKey] = field(default_factory=list)  # that the store said it has
    num_read: int = 0
    num_attached: int = 0  # pages that hang in the tree now
    pages: PageIds | None = None  # destination of the batch in flight
    is_stopped: bool = False
    is_dropped: bool = False  # what it brings was retired
    is_done: bool = False

    def covers(self, namespace: Namespace, tokens: TokenIds, *, first_page: int) -> bool:
        """Whether somebody else's prefetch brings the next pages of `tokens`, too; never one that was retired."""
        if self.is_dropped or self.is_stopped or self.namespace != namespace or self.first_page != first_page:
            return False
        common = min(len(self.tokens), len(tokens))
        return common > 0 and np.array_equal(self.tokens[:common], tokens[:common])

    def retire(self, scope: Scope, page_size: int) -> bool:
        """Drop it if `scope` retires any page that it brings; whether it does."""
        if self.is_dropped or not scope.has_namespace(self.namespace):
            return False
        limit = scope.limit_for(self.tokens, page_size)
        if limit is None or limit >= len(self.tokens) // page_size:
            return False
        self.is_dropped = True
        return True
