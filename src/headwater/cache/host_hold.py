"""A hold on host pages for an operator's pin: they are not evicted while the hold lasts."""

from collections.abc import Iterator

from headwater.cache.namespace import Tier
from headwater.cache.radix_tree import Node, Run
from headwater.cache.tier_pages import TierPages


class HostHold:
    """Pins the host runs of a path, more of them as pages arrive there. Made and changed by `LowerTiers` only."""

    def __init__(self) -> None:
        self.is_complete = False  # every page of the path is held
        self._runs: list[tuple[Run, int]] = []  # with their pages when they were pinned: a later split makes several

    def held(self) -> list[Run]:
        """The runs that it pins now."""
        return [part for run, num_pages in self._runs for part in _parts(run, num_pages)]

    @property
    def num_pages(self) -> int:
        return sum(len(run.pages) for run in self.held())

    @property
    def is_retired(self) -> bool:
        """Whether a flush has cut any of the pinned runs out of the tree."""
        return any(run.is_retired for run in self.held())

    def take(self, path: list[Node], tier_pages: TierPages) -> list[Node]:
        """Pin the runs of `path` that are on the host; returns the nodes without one."""
        held = {id(run) for run in self.held()}
        missing: list[Node] = []
        for node in path:
            run = node.runs.get(Tier.HOST)
            if run is None:
                missing.append(node)
            elif id(run) not in held:
                tier_pages.pin(run)
                self._runs.append((run, len(run.pages)))
        self.is_complete = not missing
        return missing

    def release(self, tier_pages: TierPages) -> None:
        for run in self.held():
            tier_pages.unpin(run)
        self._runs.clear()


def _parts(run: Run, num_pages: int) -> Iterator[Run]:
    """`run` and the runs that splits have cut off it since it had `num_pages`. Runs cut off earlier are above those."""
    for part in run.chain():
        yield part
        num_pages -= len(part.pages)
        if not num_pages:
            return
