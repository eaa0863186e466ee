"""Which arrivals may wait, and when a client that may not should try again."""

import math
from collections import deque

from headwater.clock import Clock
from headwater.messages.generation import Finish
from headwater.scheduling.answers import refuse_queue
from headwater.scheduling.counters import Counters
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.request import Request
from headwater.scheduling.waiting_queue import Held, WaitingQueue

MIN_RETRY_S, MAX_RETRY_S = 1, 60  # OpenAI's SDKs follow a Retry-After of up to 60 s, and ignore a longer one
_NUM_STARTS = 64  # the newest ones give the speed of the queue


class QueueGate:
    """Bounds the queue in requests and in tokens, as a whole and for each account.

    A prompt that is longer than the bound on tokens may wait if nothing else does; it could never run otherwise.
    """

    def __init__(self, waiting: WaitingQueue, *, limits: SchedulerLimits, counters: Counters, clock: Clock) -> None:
        self._waiting = waiting
        self._limits = limits
        self._counters = counters
        self._clock = clock
        self._starts: deque[tuple[float, int]] = deque(maxlen=_NUM_STARTS)  # time, tokens

    def refusal(self, request: Request) -> Finish | None:
        """Why `request` may not wait now (429), with the time after which there should be room."""
        limits, waiting, num_tokens = self._limits, self._waiting, len(request.tokens)
        held = waiting.held
        if held.num_requests >= limits.max_queued:
            self._counters.limited_queued_requests += 1
            return self._refuse(f"{held.num_requests} requests wait already", num_requests=1)
        max_tokens, share = limits.max_queued_tokens, limits.max_queue_share
        if _exceeds(held, num_tokens, max_tokens):
            self._counters.limited_queued_tokens += 1
            num_over = held.num_tokens + num_tokens - (max_tokens or 0)
            return self._refuse(f"requests with {held.num_tokens} tokens wait already", num_tokens=num_over)
        if share >= 1:
            return None
        own = waiting.held_by(request.account)
        is_over = own.num_requests >= max(1, math.floor(limits.max_queued * share))
        if is_over or _exceeds(own, num_tokens, None if max_tokens is None else math.floor(max_tokens * share)):
            self._counters.limited_queue_share += 1
            text = f"{own.num_requests} requests of your key wait already, and no key may fill the queue"
            return self._refuse(text, num_requests=1)
        return None

    def started(self, request: Request) -> None:
        """`request` has left the queue for the first time."""
        self._starts.append((self._clock.now(), len(request.tokens)))

    def whole_queue_s(self) -> int:
        """Seconds until all that wait now should have left the queue."""
        return self.retry_after_s(num_requests=len(self._waiting))

    def retry_after_s(self, *, num_requests: int = 0, num_tokens: int = 0) -> int:
        """Seconds until so many requests or tokens should have left the queue, at the speed of the last starts.

        Without any start the speed is unknown, and the answer is the longest time.
        """
        if not self._starts:
            return MAX_RETRY_S
        elapsed_s = self._clock.now() - self._starts[0][0]
        left_tokens = sum(tokens for _, tokens in self._starts)
        share = max(num_requests / len(self._starts), num_tokens / left_tokens)
        return min(max(math.ceil(elapsed_s * share), MIN_RETRY_S), MAX_RETRY_S)

    def _refuse(self, why: str, *, num_requests: int = 0, num_tokens: int = 0) -> Finish:
        return refuse_queue(why, retry_after_s=self.retry_after_s(num_requests=num_requests, num_tokens=num_tokens))


def _exceeds(held: Held, num_tokens: int, max_tokens: int | None) -> bool:
    return max_tokens is not None and held.num_requests > 0 and held.num_tokens + num_tokens > max_tokens
