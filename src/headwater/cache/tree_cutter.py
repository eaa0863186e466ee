"""Cuts the scope of a flush out of the tree, and keeps leases from publishing pages of this scope again."""

from headwater.cache.lease import Lease
from headwater.cache.namespace import Scope, Tier
from headwater.cache.radix_tree import Node, RadixTree
from headwater.cache.retirement import Retirement
from headwater.cache.tier_pages import TierPages


class TreeCutter:
    """The part of a retirement that happens in the tree and to the leases, in one turn."""

    def __init__(self, tree: RadixTree, tier_pages: dict[Tier, TierPages], leases: set[Lease]) -> None:
        self._tree = tree
        self._tier_pages = tier_pages
        self._leases = leases

    def cut(self, scope: Scope, retirement: Retirement) -> None:
        """Cut every run in `scope`: unpinned pages are freed at once, pinned pages with their last pin."""
        for root in [r for ns, r in self._tree.roots.items() if scope.has_namespace(ns)]:
            self._cut_below(self._tops(root, scope), scope.tiers, retirement)
            self._tree.drop_root_if_unused(root)
        if Tier.DEVICE in scope.tiers:
            self._limit_leases(scope, retirement)

    def preview(self, scope: Scope, *, generation: int) -> Retirement:
        """The outcome that `cut` would have now. Changes nothing."""
        preview = Retirement(generation=generation)
        for root in [r for ns, r in self._tree.roots.items() if scope.has_namespace(ns)]:
            tops = [root] if scope.prefix is None else self._tree.below(root, scope.prefix, is_dry=True)
            for top in tops:
                spared = self._num_pages_above(top, scope)
                for node in self._tree.subtree(top):
                    for tier, run in node.runs.items():
                        if tier in scope.tiers:
                            side = preview.retired if run.pins else preview.freed
                            side[tier] += len(run.pages) - (spared if node is top else 0)
        preview.num_leases = sum(1 for lease in self._leases if self._limit_of(lease, scope) is not None)
        preview.num_outstanding = sum(preview.retired.values())
        return preview

    # ------------------------------------------------------------------------------------------------

    def _tops(self, root: Node, scope: Scope) -> list[Node]:
        if scope.prefix is None:
            return list(root.children.values())
        return self._tree.below(root, scope.prefix)

    def _cut_below(self, tops: list[Node], tiers: frozenset[Tier], retirement: Retirement) -> None:
        nodes = [node for top in tops for node in self._tree.subtree(top)]
        parents = {id(top.parent): top.parent for top in tops}.values()
        for tier in tiers & self._tier_pages.keys():
            self._tier_pages[tier].cut(nodes, retirement)
        for node in reversed(nodes):  # children first
            self._tree.prune(node)
        for tier in tiers & self._tier_pages.keys():
            for parent in parents:
                if parent is not None and not parent.is_root:
                    self._tier_pages[tier].offer(parent)

    def _limit_leases(self, scope: Scope, retirement: Retirement) -> None:
        for lease in self._leases:
            limit = self._limit_of(lease, scope)
            if limit is not None:
                lease.publish_limit = min(lease.publish_limit, limit)
                lease.retirements.append(retirement)
                retirement.num_leases += 1

    def _limit_of(self, lease: Lease, scope: Scope) -> int | None:
        """The publish limit of `lease` under `scope`; None if the lease holds no page in scope."""
        if not scope.has_namespace(lease.root.namespace):
            return None
        limit = scope.limit_for(lease.tokens.view(), self._tree.page_size)
        return None if limit is None or lease.num_pages <= limit else limit

    def _num_pages_above(self, top: Node, scope: Scope) -> int:
        """Leading pages of `top` that lie above the scope: 0 unless a retirement would split `top`."""
        if scope.prefix is None or top.parent is None:
            return 0
        return max(0, scope.first_page(self._tree.page_size) - self._tree.depth(top.parent))
