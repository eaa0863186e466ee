"""How many requests of one key generate at the same time."""

import math
import time

from headwater.generation.errors import ApiError

_MAX_RETRY_S = 60  # OpenAI's SDKs follow a Retry-After of up to 60 s, and ignore a longer one
_NEWEST = 0.2  # weight of the newest duration in the mean


class Account:
    """Clients that use the same key, or none. Its number goes to the engine, which bounds its share of the queue."""

    def __init__(self, number: int = 0, *, max_running: int | None = None) -> None:
        self.number = number
        self.num_running = 0
        self.num_refused = 0
        self._max_running = max_running
        self._mean_s = 0.0  # of the requests that ended

    def enter(self) -> None:
        """A request begins to generate. ApiError 429 if as many do as may."""
        if self._max_running is not None and self.num_running >= self._max_running:
            self.num_refused += 1
            retry_after_s = min(max(math.ceil(self._mean_s / self._max_running), 1), _MAX_RETRY_S)
            raise ApiError(
                429,
                f"requests that this key may run at the same time: {self._max_running} (--max-concurrency-per-key)",
                code="too_many_requests",
                headers={"Retry-After": str(retry_after_s)},
            )
        self.num_running += 1

    def leave(self, elapsed_s: float) -> None:
        self.num_running -= 1
        self._mean_s += (elapsed_s - self._mean_s) * (_NEWEST if self._mean_s else 1)


class Permit:
    """One HTTP request's place in its account, from the start of its first generation to the end of its last."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._num_open = 0
        self._began_s = 0.0

    def open(self) -> None:
        """A generation starts. ApiError 429 if it is the first, and the account may run no more."""
        if not self._num_open:
            self.account.enter()
            self._began_s = time.monotonic()
        self._num_open += 1

    def close(self) -> None:
        """A generation has ended."""
        self._num_open -= 1
        if not self._num_open:
            self.account.leave(time.monotonic() - self._began_s)
