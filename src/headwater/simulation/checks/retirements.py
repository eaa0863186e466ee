"""Marks the pages that a flush covers, so that a later read of them is noticed."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headwater.cache.namespace import UNLOADED, Tier
from headwater.cache.prefetch import Prefetch
from headwater.messages.base import unpack_ids
from headwater.messages.control import FlushCache
from headwater.simulation.checks.violation import demand
from headwater.simulation.fakes.copier import FakeCopier
from headwater.simulation.fakes.kv_records import Records
from headwater.simulation.fakes.shared_world import KvSequence, SharedWorld, StoreRetirement

_DEFAULT_TIERS = ("device", "host")


class Retirements:
    """Determines the pages in a flush's scope from the records alone.

    A page on a flushed tier is marked there; a copy to such a tier marks its target at its end. Pages of a store are
    identified by their time of birth instead.
    """

    def __init__(
        self,
        world: SharedWorld,
        *,
        engine: object,
        device: Records,
        copied_at: npt.NDArray[np.uint32],
        copier: FakeCopier | None,
        prefetches: Callable[[], list[Prefetch]],
        content_of_name: Callable[[str], str | None],
    ) -> None:
        """`content_of_name`: what a LoRA adapter's name means in this moment; None: nothing."""
        self._content_of_name = content_of_name
        self._world = world
        self._prefetches = prefetches
        self._doomed: list[tuple[Prefetch, int]] = []  # with the number of pages that it may attach
        self._engine = engine
        self._device = device
        self._copied_at = copied_at
        self._copier = copier
        self._page_size = device.shape[1]
        self._marks = {Tier.DEVICE: device["retired"][:, 0]}
        if copier is not None:
            self._marks[Tier.HOST] = copier.host["retired"][:, 0]

    def adapter_in(self, flush: FlushCache) -> str | None:
        """The content of a LoRA adapter that a flush would cover in this moment; None: all, and no adapter."""
        if flush.lora_name is None:
            return None
        content = self._content_of_name(flush.lora_name)
        return UNLOADED if content is None else content

    def apply(self, flush: FlushCache, *, turn: int, adapter: str | None) -> StoreRetirement | None:
        """`flush` took effect in `turn`, before the computations of that turn, with this content of an adapter."""
        tiers = flush.tiers or _DEFAULT_TIERS
        if "device" in tiers:
            covered = self._covered(self._device, flush, turn, adapter)
            # what was copied in this turn, behind the flush, is in pages that did not exist before
            covered = [page for page in covered if self._copied_at[page] < turn]
            self._set_marks(self._device["retired"], covered, turn)
        if self._copier is not None:
            if "host" in tiers:
                host = self._copier.host
                self._set_marks(host["retired"], self._covered(host, flush, turn, adapter), turn)
            targets = {"offload": "host", "restore": "device"}
            for copy in self._copier.open_copies:
                if targets[copy.kind] in tiers and copy.turn < turn:
                    self._set_marks(copy.retired, self._covered(copy.before, flush, turn, adapter), turn)
        if "host" in tiers or "storage" in tiers:
            self._doom_prefetches(flush, adapter)
        if "storage" not in tiers:
            return None
        retirement = StoreRetirement(flush.cache_salt, flush.extra_key, turn, self._engine)
        self._world.store_retirements.append(retirement)
        return retirement

    def check(self) -> None:
        """No prefetch from a store has attached pages that a flush covered."""
        for prefetch, num_pages in self._doomed:
            demand(prefetch.num_attached <= num_pages, "flushed_is_gone", "a prefetch brought what was flushed")
        self._doomed = [(prefetch, num_pages) for prefetch, num_pages in self._doomed if not prefetch.is_done]

    def marked_pages(self, tier: Tier) -> npt.NDArray[np.intp]:
        """Pages of `tier` whose contents a flush has covered, with any owner."""
        return self._marks[tier].nonzero()[0]

    def pages_in_scope(self, flush: FlushCache, in_tree: dict[Tier, frozenset[int]]) -> dict[Tier, frozenset[int]]:
        """The pages of `in_tree`, by tier, that the parameters of `flush` name. They may be of any weights."""
        tiers, adapter = flush.tiers or _DEFAULT_TIERS, self.adapter_in(flush)
        found: dict[Tier, frozenset[int]] = {}
        for tier, pages in in_tree.items():
            is_named = tier.name.lower() in tiers and pages
            covered = self._covered(self._records(tier), flush, self._world.turn + 1, adapter) if is_named else []
            found[tier] = pages.intersection(covered)
        return found

    def pages_of_other_weights(
        self, weights_id: str, in_tree: dict[Tier, frozenset[int]]
    ) -> dict[Tier, frozenset[int]]:
        """The pages of `in_tree`, by tier, that other weights computed."""
        found: dict[Tier, frozenset[int]] = {}
        for tier, pages in in_tree.items():
            owners = self._records(tier)["sequence"][:, 0]
            found[tier] = frozenset(p for p in pages if self._world.sequence(int(owners[p])).weights != weights_id)
        return found

    def pages_of_adapter(self, adapter: str, in_tree: dict[Tier, frozenset[int]]) -> dict[Tier, frozenset[int]]:
        """The pages of `in_tree`, by tier, that this content of a LoRA adapter computed."""
        found: dict[Tier, frozenset[int]] = {}
        for tier, pages in in_tree.items():
            owners = self._records(tier)["sequence"][:, 0]
            found[tier] = frozenset(p for p in pages if self._world.sequence(int(owners[p])).adapter == adapter)
        return found

    def _records(self, tier: Tier) -> Records:
        return self._device if tier is Tier.DEVICE or self._copier is None else self._copier.host

    def holds_any_of(self, flush: FlushCache, pages: Records, *, turn: int, adapter: str | None) -> bool:
        """Whether any of `pages`, all of them written, was covered by `flush` in `turn`.

        Pages that were copied later from a tier outside of the flush have no mark.
        """
        marks = pages["retired"][:, 0]
        return bool(self._covered(pages[(marks > 0) & (marks <= turn)], flush, turn, adapter))

    def _doom_prefetches(self, flush: FlushCache, adapter: str | None) -> None:
        prefix = None if flush.prefix_ids is None else unpack_ids(flush.prefix_ids).tolist()
        for prefetch in self._prefetches():
            if flush.cache_salt not in (None, prefetch.namespace.cache_salt):
                continue
            if flush.extra_key not in (None, prefetch.namespace.extra_key):
                continue
            if adapter not in (None, prefetch.namespace.adapter):
                continue
            num_pages = prefetch.num_attached
            if prefix is not None:
                common = min(len(prefix), len(prefetch.tokens))
                if prefetch.tokens[:common].tolist() != prefix[:common]:
                    continue
                num_pages = max(num_pages, (len(prefix) - 1) // self._page_size - prefetch.first_page)
            self._doomed.append((prefetch, num_pages))

    def _set_marks(self, marks: npt.NDArray[np.uint32], pages: list[int], turn: int) -> None:
        """Mark pages; those that an earlier flush covered keep its mark."""
        at = [page for page in pages if not marks[page, 0]]
        marks[at] = turn

    def _covered(self, records: Records, flush: FlushCache, turn: int, adapter: str | None) -> list[int]:
        """Indices of the pages in the flush's scope born before `turn`. A page is as old as its first token."""
        first = records[:, 0]
        written = np.flatnonzero((first["canary"] != 0) & (first["birth"] < turn))
        prefix = None if flush.prefix_ids is None else unpack_ids(flush.prefix_ids).tolist()
        owners = first["sequence"][written].tolist()
        positions = first["position"][written].tolist()
        salt, key = flush.cache_salt, flush.extra_key
        found: list[int] = []
        sequences = self._world.sequences
        for page, number, position in zip(written.tolist(), owners, positions, strict=True):
            sequence = sequences[number] if number < len(sequences) else self._world.sequence(number)
            if salt is not None and salt != sequence.cache_salt:
                continue
            if key is not None and key != sequence.extra_key:
                continue
            if adapter is not None and adapter != sequence.adapter:
                continue
            if prefix is None or self._is_below(prefix, sequence, position):
                found.append(page)
        return found

    def _is_below(self, prefix: list[int], sequence: KvSequence, position: int) -> bool:
        """Whether the page at `position` has the last token of `prefix`, or comes after that page."""
        if position // self._page_size < (len(prefix) - 1) // self._page_size:
            return False
        common = min(len(prefix), len(sequence.tokens))
        return sequence.tokens[:common] == prefix[:common]
