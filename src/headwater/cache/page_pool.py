"""Page ids of one tier and who owns each of them."""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

PageIds = npt.NDArray[np.int32]


class Owner(IntEnum):
    """Who may free a page. Every page has exactly one owner at any time."""

    FREE = 0  # the pool's free list
    TREE = 1  # a run of a node that requests can match
    PRIVATE = 2  # one lease, not shared
    RETIRED = 3  # a run cut from the tree that a lease still pins
    TRANSFER = 4  # destination of a copy in flight


class OwnershipError(AssertionError):
    """A page was freed or handed over by a component that does not own it. Never caught: the books are wrong."""


class PagePool:
    """The pages [0, capacity) of one tier. Hands them out, and checks every change of owner.

    Pages are freed by their owners only: there is no way to clear a pool.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a page pool needs at least one page, got capacity={capacity}")
        self.capacity = capacity
        self._owner = np.zeros(capacity, dtype=np.uint8)
        # Free pages, the next one last. Of numpy's index type: converting them would cost more than the lookup.
        self._stack = np.arange(capacity - 1, -1, -1, dtype=np.intp)
        self._counts = [capacity, 0, 0, 0, 0]

    @property
    def num_free(self) -> int:
        return self._counts[Owner.FREE]

    def count(self, owner: Owner) -> int:
        return self._counts[owner]

    def take(self, num_pages: int, *, owner: Owner) -> PageIds | None:
        """`num_pages` free pages, now owned by `owner`; None (and no change) if there are fewer. int32[n]."""
        top = self._counts[Owner.FREE]
        if num_pages > top:
            return None
        at = self._stack[top - num_pages : top][::-1]
        self._owner[at] = int(owner)
        self._counts[Owner.FREE] -= num_pages
        self._counts[owner] += num_pages
        return at.astype(np.int32)

    def hand_over(self, pages: PageIds, *, giver: Owner, taker: Owner) -> None:
        """Change the owner of `pages` from `giver` to `taker`; neither is the free list."""
        assert taker != Owner.FREE, "pages go back through free()"
        at = self._check(pages, giver)
        self._owner[at] = int(taker)
        self._counts[giver] -= len(pages)
        self._counts[taker] += len(pages)

    def free(self, pages: PageIds, *, giver: Owner) -> None:
        """Return `pages`, owned by `giver`, to the free list."""
        at = self._check(pages, giver)
        self._owner[at] = 0
        top = self._counts[Owner.FREE]
        self._stack[top : top + len(pages)] = pages
        self._counts[Owner.FREE] += len(pages)
        self._counts[giver] -= len(pages)

    def counts(self) -> list[int]:
        """Pages of each owner, by `Owner`."""
        return self._counts.copy()

    def owner_of(self, page: int) -> Owner:
        return Owner(int(self._owner[page]))

    def has_owners(self, owners: npt.NDArray[np.uint8]) -> bool:
        """Whether `owners`, uint8[capacity] of `Owner`, are the owners of all pages."""
        return owners.tobytes() == self._owner.tobytes()

    def pages_of(self, owner: Owner) -> list[int]:
        """All pages that belong to `owner`."""
        return (self._owner == int(owner)).nonzero()[0].tolist()

    def num_owned(self, pages: npt.NDArray[np.integer], owner: Owner) -> int:
        """How many of `pages` belong to `owner`."""
        if pages.dtype != np.intp:
            pages = pages.astype(np.intp)
        return self._owner[pages].tobytes().count(owner)  # five times as fast as numpy's comparison

    def check(self) -> None:
        """Raise `OwnershipError` if the counts, the owners and the free list disagree."""
        owners = self._owner.tobytes()
        counts = [owners.count(owner) for owner in Owner]
        if counts != self._counts or sum(counts) != self.capacity:
            raise OwnershipError(f"pages by owner {counts}, counted {self._counts}, capacity {self.capacity}")
        free = self._stack[: self.num_free]
        if len(set(free.tolist())) != len(free) or self.num_owned(free, Owner.FREE) != len(free):
            raise OwnershipError("the free list holds a page twice, or one that is owned")

    def _check(self, pages: PageIds, giver: Owner) -> npt.NDArray[np.intp]:
        """Raise `OwnershipError` if `giver` lacks any of `pages`; returns them as numpy's index type, for reuse."""
        assert giver != Owner.FREE
        at = pages.astype(np.intp)
        if self.num_owned(at, giver) != len(pages):
            page = next(page for page in pages.tolist() if self.owner_of(page) != giver)
            raise OwnershipError(f"page {page} belongs to {self.owner_of(page).name}, not to {giver.name}")
        return at
