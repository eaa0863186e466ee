"""Copies in flight between device and host."""

from dataclasses import dataclass, field

from headwater.cache.copier import CopyHandle
from headwater.cache.lease import Lease
from headwater.cache.namespace import Tier
from headwater.cache.page_pool import PageIds
from headwater.cache.radix_tree import Node, Run


@dataclass(slots=True, eq=False)
class Transfer:
    """One copy. Pins its source runs until it is done.

    It owns its destination pages until it delivers them: attaches them to the tree, where requests find them. It
    delivers when it is done. A restore may deliver earlier, once it is readable, and then pins the attached runs until
    it is done.

    `sources` are runs from upper to lower, each with its number of pages when the copy began. A run that is split
    meanwhile keeps naming its lower end, and `segments` finds the upper parts again.
    """

    source_tier: Tier
    destination_tier: Tier
    sources: list[tuple[Run, int]]
    pages: PageIds  # destination, in the order of the sources
    handle: CopyHandle
    is_parking: bool = False  # other requests need its source pages as soon as it is done
    is_dropped: bool = False  # its pages were retired: do not attach them
    is_delivered: bool = False
    spare: list[PageIds] = field(default_factory=list)  # after delivery: pages that could not be attached
    arriving: Run | None = None  # the lowest run attached before it was done

    @property
    def kind(self) -> str:
        return "restore" if self.destination_tier is Tier.DEVICE else "offload"

    @property
    def lowest(self) -> Node:
        return self.sources[-1][0].node

    @property
    def owned(self) -> list[PageIds]:
        """The destination pages that it owns now."""
        return self.spare if self.is_delivered else [self.pages]

    def pinned(self) -> list[Run]:
        """The runs that it pins: on the device whole paths, on the host the runs that it reads."""
        if self.source_tier is Tier.DEVICE:
            return list(self.sources[-1][0].chain())
        arriving = [] if self.arriving is None else list(self.arriving.chain())
        return arriving + [run for run, _ in self.segments()]

    def segments(self) -> list[tuple[Run, PageIds]]:
        """The source runs as they are now, upper first, each with its destination pages."""
        found: list[tuple[Run, PageIds]] = []
        end = len(self.pages)
        for run, num_pages in reversed(self.sources):
            for part in run.chain():
                found.append((part, self.pages[end - len(part.pages) : end]))
                end -= len(part.pages)
                num_pages -= len(part.pages)
                if num_pages == 0:
                    break
        assert end == 0
        return found[::-1]


@dataclass(slots=True, eq=False)
class Restore:
    """A restore that requests wait for, outside the batch: the copy of a prefix from the host to the device.

    Several requests may wait for one restore. `is_done` means delivered: `num_tokens` are on the device or arriving
    there, unless a retirement dropped the restore or it failed (`was_dropped`).
    """

    num_tokens: int
    lease: Lease | None  # keeps the path above on the device; released after the delivery
    is_done: bool = False
    was_dropped: bool = False
    nodes: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class TransferCounters:
    """Counts in pages, by kind (`offload`, `restore`, `persist`, `prefetch`) and by cause.

    `seconds` is the time of the copies themselves, without their wait for each other or for the loop's next turn.
    """

    pages: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    dropped_pages: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, pages: int, seconds: float) -> None:
        self.pages[kind] = self.pages.get(kind, 0) + pages
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def drop(self, cause: str, pages: int) -> None:
        self.dropped_pages[cause] = self.dropped_pages.get(cause, 0) + pages

    def count(self, event: str, by: int = 1) -> None:
        self.events[event] = self.events.get(event, 0) + by
