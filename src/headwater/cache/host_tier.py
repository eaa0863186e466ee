"""The parts of the host tier: its pages, the copier, and the policy that fills it."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from headwater.cache.copier import PageCopier


class WritePolicy(Enum):
    """When device pages are copied to the host.

    `write_through`: when they are shared. `write_through_selective`: when they are hit again. `write_back`: before they
    are evicted. A page that is evicted before its copy begins is computed again; answers stay correct.
    """

    WRITE_THROUGH = "write_through"
    WRITE_THROUGH_SELECTIVE = "write_through_selective"
    WRITE_BACK = "write_back"


class RestorePolicy(Enum):
    """Whether a request takes its pages from the host: `auto`, if that looks quicker than computing them; `always`."""

    AUTO = "auto"
    ALWAYS = "always"


class HostPages(Protocol):
    """Host memory by page id."""

    @property
    def page_bytes(self) -> int: ...

    def view(self, page: int) -> memoryview:
        """A writable view of one page's bytes, for the owner of the page."""
        ...


@dataclass(frozen=True, slots=True)
class HostTier:
    """Host memory as the tier below the device."""

    num_pages: int
    copier: PageCopier
    pages: HostPages
    policy: WritePolicy
    restore_policy: RestorePolicy = RestorePolicy.AUTO
    max_pages_in_flight: int = 4096
    min_restore_tokens: int = 32  # shorter prefixes are computed, not copied
    num_ready: Callable[[], int] | None = None  # pages in memory that is pinned already; None: all
