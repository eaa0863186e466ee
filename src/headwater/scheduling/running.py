"""Requests in slots: their pages, and how far steps have computed them."""

from collections.abc import Iterable, Iterator

from headwater.cache.lease import Lease
from headwater.cache.pins import PinBoard
from headwater.cache.prefix_cache import PrefixCache
from headwater.scheduling.plan import PageUpdate
from headwater.scheduling.plan_builder import Row
from headwater.scheduling.request import Phase, Progress, Request


class Slots:
    """The use count of a slot separates results of its present request from those of earlier ones."""

    def __init__(self, num_slots: int) -> None:
        self.uses = [0] * num_slots
        self._requests: list[Request | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def is_full(self) -> bool:
        return not self._free

    def enter(self, request: Request) -> int:
        """Give `request` a slot; returns the use count of the slot."""
        slot = self._free.pop()
        self.uses[slot] += 1
        self._requests[slot] = request
        request.slot = slot
        return self.uses[slot]

    def leave(self, request: Request) -> None:
        self._requests[request.slot] = None
        self._free.append(request.slot)
        request.slot = -1

    def at(self, slot: int, *, use: int) -> Request | None:
        """The request that a result belongs to; None if it has left the slot."""
        return self._requests[slot] if self.uses[slot] == use else None


class RunningRequests:
    """In order of admission. Owns their leases, and writes `Request.progress`.

    When a request leaves, its lease is released after the last step that uses its pages.
    """

    def __init__(self, cache: PrefixCache, *, num_slots: int, pins: PinBoard) -> None:
        self.slots = Slots(num_slots)
        self._cache = cache
        self._pins = pins
        self._requests: list[Request] = []
        self._collected_step_id = -1
        self._leaving: list[tuple[int, Lease]] = []  # last step that uses its pages, lease

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def has_leaving_pages(self) -> bool:
        """Whether a step in flight keeps pages of requests that have left."""
        return bool(self._leaving)

    @property
    def awaits_pages(self) -> bool:
        """Whether pages become free without a retraction."""
        if self._leaving or self._cache.lower.is_parking:
            return True
        return len(self._requests) == 1 and self._will_free_pages()

    def reserve(self, request: Request, lease: Lease) -> bool:
        """Extend `lease` to all known tokens and the next one. Each running request keeps a free page to grow into.

        If its part of a page is in the way of that, because it is pinned, the lease goes without. If pins are, and
        nothing runs, they give way.
        """
        num_tokens = len(request.tokens) + (request.max_new_tokens > 0)  # a full context has no next token
        num_pages = -(-num_tokens // self._cache.page_size) - lease.num_pages
        if self._extend_by(num_pages, lease):
            return True
        if lease.part is not None:
            self._cache.drop_part(lease)
            if self._extend_by(num_pages, lease):
                return True
        return not self._requests and self._pins_give_way(num_pages, request) and self._extend_by(num_pages, lease)

    def _extend_by(self, num_pages: int, lease: Lease) -> bool:
        if self._requests and self._cache.num_available < num_pages + len(self._requests):
            return False
        return self._cache.extend(lease, num_pages) is not None

    def _pins_give_way(self, num_pages: int, request: Request) -> bool:
        """Have pins free pages for `request`, if nothing else will. No other request may be running."""
        return not self._will_free_pages() and self._pins.give_way(num_pages, to=request.rid)

    def _will_free_pages(self) -> bool:
        """Whether steps in flight or copies hold pages that nothing needs later."""
        if self._leaving or self._cache.lower.is_copying:
            return True
        leases = (request.lease for request in self._requests)
        return any(lease is not None and (lease.superseded or lease.part) for lease in leases)

    def enter(self, request: Request, lease: Lease) -> int:
        """Take `request` in with its pages; returns the use count of its slot."""
        use = self.slots.enter(request)
        request.lease = lease
        num_cached = lease.num_matched_pages * self._cache.page_size
        if lease.part is not None:
            num_cached += lease.part.num_tokens
        request.progress = Progress(
            num_computed=num_cached,
            num_written=num_cached,
            num_launched_samples=request.num_outputs,
            page_updates=[PageUpdate(request.slot, 0, lease.page_table())],
        )
        self._requests.append(request)
        return use

    def leave(self, request: Request) -> None:
        """Give up slot and lease."""
        assert request.lease is not None
        self._leaving.append((request.progress.last_step_id, request.lease))
        request.lease = None
        request.progress.page_updates = []
        self.slots.leave(request)
        self._requests.remove(request)
        self.release_leaving()

    def has_page_for_next_token(self, request: Request) -> bool:
        assert request.lease is not None
        return request.progress.num_computed < request.lease.num_pages * self._cache.page_size

    def extend(self, request: Request) -> bool:
        """Add a page, if the cache has one, or if pins can give one to the only running request."""
        lease = request.lease
        assert lease is not None
        pages = self._cache.extend(lease, 1)
        if pages is None and len(self._requests) == 1 and self._pins_give_way(1, request):
            pages = self._cache.extend(lease, 1)
        if pages is None:
            return False
        request.progress.page_updates.append(PageUpdate(request.slot, lease.num_pages - 1, pages))
        return True

    def make_room(self, request: Request, num_ahead: int) -> int:
        """Have pages for so many tokens behind the next one, or for fewer; returns for how many there are.

        Takes pages that are free and that no running request needs for its next token. Never evicts.
        """
        lease, pool = request.lease, self._cache.pool
        assert lease is not None
        wanted = request.progress.num_computed + 1 + num_ahead
        while lease.num_pages * self._cache.page_size < wanted and pool.num_free > len(self._requests):
            if not self.extend(request):
                break
        return min(num_ahead, lease.num_pages * self._cache.page_size - request.progress.num_computed - 1)

    def take_page_updates(self, rows: Iterable[Row]) -> tuple[PageUpdate, ...]:
        """The changes of the page tables of `rows` since their last step."""
        taken: list[PageUpdate] = []
        for request, _, _ in rows:
            progress = request.progress
            if progress.page_updates:
                taken += progress.page_updates
                progress.page_updates = []
        return tuple(taken)

    def launched(self, rows: Iterable[Row], step_id: int) -> None:
        """A step that computes `rows` is under way."""
        for request, num_tokens, samples in rows:
            progress = request.progress
            progress.num_computed += num_tokens
            progress.num_launched_samples += samples
            progress.last_step_id = step_id
            if request.phase is Phase.PREFILLING and progress.num_computed >= len(request.tokens):
                request.enter(Phase.DECODING)

    def collected(self, step_id: int) -> None:
        """Steps up to `step_id` run no longer."""
        self._collected_step_id = step_id

    def written(self, request: Request, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is there."""
        request.progress.num_written = num_tokens

    def rejected(self, request: Request) -> None:
        """The last token that a step has computed for `request` was drafted, and is none of its tokens."""
        request.progress.num_computed -= 1
        request.progress.num_launched_samples -= 1

    def publish(self, request: Request) -> None:
        """Share the full pages that collected steps have written."""
        lease, progress = request.lease, request.progress
        assert lease is not None
        for first, pages in self._cache.publish(lease, progress.num_written):
            progress.page_updates.append(PageUpdate(request.slot, first, pages))
        if progress.last_step_id <= self._collected_step_id:
            self._cache.settle(lease)

    def release_leaving(self) -> None:
        """Release the leases that no step in flight uses any more."""
        if not self._leaving:
            return
        still_in_use = []
        for step_id, lease in self._leaving:
            if step_id <= self._collected_step_id:
                self._cache.release(lease)
            else:
                still_in_use.append((step_id, lease))
        self._leaving = still_in_use
