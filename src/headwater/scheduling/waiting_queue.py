"""Requests that hold no pages, in the order of service."""

import bisect
from collections.abc import Iterator
from typing import Literal, NamedTuple

from headwater.cache.prefix_cache import PrefixCache
from headwater.scheduling.request import Request

SchedulePolicy = Literal["fcfs", "lpm"]
_NUM_MATCHED_AHEAD = 128  # lpm looks this far into the queue, so that a long queue costs a bounded walk


class Held(NamedTuple):
    """Waiting requests, and the tokens that they have."""

    num_requests: int = 0
    num_tokens: int = 0


class WaitingQueue:
    """Priority first; within one priority by arrival (fcfs) or by longest cached prefix (lpm)."""

    def __init__(self, policy: SchedulePolicy) -> None:
        self._policy = policy
        self._requests: list[Request] = []  # by Request.queue_key
        self._held_by: dict[int, Held] = {}  # by account
        self.held = Held()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def held_by(self, account: int) -> Held:
        """What one account has waiting."""
        return self._held_by.get(account, Held())

    def add(self, request: Request) -> None:
        bisect.insort(self._requests, request, key=lambda r: r.queue_key)
        self._count(request, 1)

    def remove(self, request: Request) -> None:
        at = bisect.bisect_left(self._requests, request.queue_key, key=lambda r: r.queue_key)
        assert self._requests[at] is request
        del self._requests[at]
        self._count(request, -1)

    def keep_place(self, request: Request) -> None:
        """`request` counts as waiting, though it is not in the queue: its grammar is being compiled."""
        self._count(request, 1)

    def give_up_place(self, request: Request) -> None:
        """The end of `keep_place`."""
        self._count(request, -1)

    def _count(self, request: Request, sign: int) -> None:
        num_tokens = sign * len(request.tokens)  # which do not change while it waits
        self.held = Held(self.held.num_requests + sign, self.held.num_tokens + num_tokens)
        own = self.held_by(request.account)
        self._held_by[request.account] = Held(own.num_requests + sign, own.num_tokens + num_tokens)

    def in_service_order(self, cache: PrefixCache, weights_id: str) -> list[Request]:
        """A snapshot, next first."""
        if self._policy == "fcfs" or len(self._requests) < 2:
            return self._requests.copy()
        head = self._requests[:_NUM_MATCHED_AHEAD]
        for request in head:
            state = (cache.version, weights_id, len(request.tokens))
            if request.matched_at != state:
                request.matched_at = state
                request.num_matched = cache.peek(request.namespace(weights_id), request.tokens.view())
        head.sort(key=lambda r: (r.queue_key[0], -r.num_matched, r.queue_key[1]))
        return head + self._requests[_NUM_MATCHED_AHEAD:]
