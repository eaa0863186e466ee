"""Which of several engines a request goes to. The planner of fleets uses the same rule."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

MAX_EXTRA_REQUESTS = 4  # by which an engine that knows the prefix may exceed the least loaded one


class Candidate(Protocol):
    """An engine that could take a request."""

    @property
    def index(self) -> int: ...

    @property
    def num_running(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def choose_engine(candidates: Sequence[C], known: Iterable[set[int]]) -> C:
    """The candidate that knows most of the prompt, unless it is much busier; else the least loaded.

    `known`: indices of engines that know a prefix of the prompt, the longest prefix first.
    """
    least = min(candidates, key=lambda each: each.num_running)
    for indices in known:
        knowing = [each for each in candidates if each.index in indices]
        best = min(knowing, key=lambda each: each.num_running, default=None)
        if best is not None and best.num_running <= least.num_running + MAX_EXTRA_REQUESTS:
            return best
    return least
