"""When to wait for a prefix that another request is computing right now."""

from collections.abc import Iterable

import numpy as np

from headwater.cache.lease import Lease
from headwater.messages.base import TokenIds
from headwater.scheduling.request import Request

_MIN_TOKENS = 64  # a shorter gain is not worth a step's delay
_MIN_PART = 0.25  # of what the request would otherwise compute


def is_worth_waiting(lease: Lease, matchable: TokenIds, running: Iterable[Request], *, page_size: int) -> bool:
    """Whether a running prefill will soon publish a good part of the tokens that a request would compute itself.

    `lease` holds the pages matched so far; `matchable` are the request's tokens that may come from the cache.
    """
    num_cached = lease.num_shared_pages * page_size
    num_missing = len(matchable) - num_cached
    needed = max(_MIN_TOKENS, int(_MIN_PART * num_missing))
    if lease.publish_limit == 0 or num_missing < needed:
        return False
    wanted = matchable[: num_cached + needed]
    for other in running:
        if other.lease is None or other.lease.root is not lease.root:
            continue
        # Only pages that it has yet to publish count, and only while it computes them.
        num_coming = min(len(other.tokens), other.lease.publish_limit * page_size)
        if num_coming < len(wanted) or other.progress.num_written >= num_coming - 1:
            continue
        if np.array_equal(other.tokens.view(0, len(wanted)), wanted):
            return True
    return False
