"""What the host tier is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from headwater.cache.copier import PageCopier
from headwater.cache.host_pages import HostPages
from headwater.cache.write_policy import WritePolicy


@dataclass(frozen=True, slots=True)
class HostTier:
    """Pages in host memory below those of the device."""

    num_pages: int
    copier: PageCopier
    pages: HostPages
    policy: WritePolicy
    max_pages_in_flight: int = 4096
    min_restore_tokens: int = 32  # less is computed rather than copied
    num_ready: Callable[[], int] | None = None  # pages that copies reach by now; None: all
