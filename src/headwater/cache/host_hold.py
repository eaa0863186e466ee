"""A hold on host pages that no request uses: they are not evicted while it lasts."""

from headwater.cache.namespace import Tier
from headwater.cache.radix_tree import Node, Run
from headwater.cache.tier_pages import TierPages


class HostHold:
    """Pins host runs along a path of nodes, as they come. Made and changed by `PrefixCache` only."""

    def __init__(self) -> None:
        self.is_complete = False  # every page of the path is held
        self._runs: list[Run] = []  # as they were when they were pinned; a split makes several of one

    def held(self) -> list[Run]:
        """The runs it pins now."""
        return [part for run in self._runs for part in run.chain()]

    @property
    def num_pages(self) -> int:
        return sum(len(run.pages) for run in self.held())

    @property
    def is_retired(self) -> bool:
        """Whether a flush has cut out anything it pins."""
        return any(run.is_retired for run in self.held())

    def take(self, path: list[Node], tier_pages: TierPages) -> list[Node]:
        """Pin what of `path` is on the host; returns the nodes that are not."""
        held = {id(run) for run in self.held()}
        missing: list[Node] = []
        for node in path:
            run = node.runs.get(Tier.HOST)
            if run is None:
                missing.append(node)
            elif id(run) not in held:
                tier_pages.pin(run)
                self._runs.append(run)
        self.is_complete = not missing
        return missing

    def release(self, tier_pages: TierPages) -> None:
        for run in self.held():
            tier_pages.unpin(run)
        self._runs.clear()
