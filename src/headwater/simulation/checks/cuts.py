"""Compares the pages that flushes cut out of the tree with the pages that their callers named."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from headwater.cache.namespace import Scope, Tier
from headwater.cache.page_pool import Owner
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.retirement import Retirement
from headwater.messages.control import FlushCache, FlushResult
from headwater.simulation.checks.pending_calls import CallKey, PendingCall, PendingCalls
from headwater.simulation.checks.retirements import Retirements
from headwater.simulation.checks.violation import Violation, demand

Pages = dict[Tier, frozenset[int]]
Counts = dict[str, tuple[int, int]]  # by tier: pages freed, and pages still held


@dataclass(frozen=True, slots=True)
class Cut:
    """One retirement or preview: the pages due for each waiting call, and the pages that were cut."""

    due: dict[CallKey, Pages]
    pages: Pages  # empty for a preview
    counts: Counts  # for a preview, those that it reports
    held: frozenset[int] = frozenset()  # device pages that requests held at the time of a preview
    is_quiet: bool = False  # nothing was held at the time of a preview
    adapter: str | None = None  # the content of a LoRA adapter that it was limited to
    adapters_due: dict[CallKey, str | None] = field(default_factory=dict)  # the content that each waiting call named
    generation: int = 0  # after it

    def is_for(self, key: CallKey) -> bool:
        """Whether it cut what this call named, at that time."""
        return self.pages == self.due.get(key) and self.adapter == self.adapters_due.get(key)


class Cuts:
    """Watches the cache of one engine. Scopes come from the callers' messages only, never from the engine.

    A flush cuts in the turn in which it takes effect; several flushes cut in the order of their arrival.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        retirements: Retirements,
        calls: PendingCalls,
        held_pages: Callable[[], set[int]],
        is_quiet: Callable[[], bool],
        note_adapter: Callable[[str], None],
    ) -> None:
        """`held_pages`: device pages of running requests. `is_quiet`: whether nothing is held.

        `note_adapter` is called with each content of a LoRA adapter whose pages are cut.
        """
        self._note_adapter = note_adapter
        self._cache = cache
        self._retirements = retirements
        self._calls = calls
        self._held_pages = held_pages
        self._is_quiet = is_quiet
        self._cuts: list[Cut] = []  # of this turn
        self._previews: list[Cut] = []
        self._weights: list[str] = []  # for which pages of other weights were cut
        self._counts: dict[CallKey, list[tuple[Counts, int]]] = {}  # and generations, of flushes without their answer
        self.num_cuts = 0  # of flushes, releases, new weights and adapters
        self.generation = 0  # by the cuts
        self.totals = {"retired_tokens": 0, "retired_pages_freed": 0, "retired_pages_held": 0}  # of all cuts
        self._retire, self._preview = cache.retire, cache.preview
        cache.retire = self._checked_retire  # type: ignore[method-assign]  # sees the pages before a flush
        cache.preview = self._checked_preview  # type: ignore[method-assign]

    def end_turn(
        self,
        applied: list[PendingCall],
        answers: list[tuple[PendingCall, FlushResult]],
        *,
        weights_id: str,
        num_releases: int,
    ) -> None:
        """`applied` took effect in this turn, `answers` were received, and `weights_id` is in place.

        Memory may have been released up to `num_releases` times, and each release cuts as well.
        """
        if not (applied or answers or self._cuts or self._previews or self._weights):
            return  # the case in most turns
        cuts, self._cuts = self._cuts, []
        of_adapters = [cut for cut in cuts if cut.adapter is not None]
        for adapter in self._left_over(applied, of_adapters):
            self._note_adapter(adapter)
        previews, self._previews = self._previews, []
        applied = sorted(applied, key=lambda call: call.number)
        self._assign(applied, cuts, num_others=num_releases + len(of_adapters))
        dry = sorted((a for a in answers if a[1].dry_run), key=lambda each: each[0].number)
        demand(len(dry) == len(previews), "dry_run_is_dry", f"{len(dry)} are answered, {len(previews)} looked")
        for (call, answer), preview in zip(dry, previews, strict=True):
            self._check_preview(call, answer, preview)
        for call, answer in answers:
            counts = self._counts.pop((call.client, answer.call_id), None)
            if not answer.dry_run and answer.success:
                counted = _reported(answer), answer.generation
                demand(counted in (counts or []), "counts_are_right", f"{call.message}: {counted}, cut {counts}")
        cut_for = self._weights[-1:]  # several updates may end in one turn
        demand(cut_for in ([], [weights_id]), "flush_is_exact", f"cut for {cut_for}, {weights_id} are in place")
        self._weights.clear()

    # ------------------------------------------------------------------------------------------------

    def _checked_retire(self, scope: Scope) -> Retirement:
        before = self._in_tree()
        due = self._due(before)
        other_than = scope.other_than_weights_id
        due_of_weights = self._retirements.pages_of_other_weights(other_than, before) if other_than is not None else {}
        due_of_adapter = {} if scope.adapter is None else self._retirements.pages_of_adapter(scope.adapter, before)
        is_quiet = self._is_quiet()
        retirement = self._retire(scope)
        after = self._in_tree()
        pages = {tier: before[tier] - after[tier] for tier in before}
        self._check_generation(retirement, any(pages.values()), is_quiet=is_quiet)
        counts: Counts = {}
        for tier, cut in pages.items():
            pool = self._cache.tier_pages[tier].pool
            num_freed = pool.num_owned(np.array(sorted(cut), dtype=np.int32), Owner.FREE)
            counts[tier.name.lower()] = (num_freed, len(cut) - num_freed)
            self.totals["retired_tokens"] += len(cut) * self._cache.page_size
            self.totals["retired_pages_freed"] += num_freed
            self.totals["retired_pages_held"] += len(cut) - num_freed
        if scope.adapter is not None:
            is_right = pages == due_of_adapter or any(pages == each for each in due.values())
            demand(is_right, "flush_is_exact", f"{scope}: {_differ(pages, due_of_adapter)}")
        if scope.adapter is None and other_than is not None:
            demand(pages == due_of_weights, "flush_is_exact", f"{scope}: {_differ(pages, due_of_weights)}")
            self._weights.append(other_than)
        else:
            adapters_due = self._adapters_due()
            cut = Cut(
                due, pages, counts, adapter=scope.adapter, adapters_due=adapters_due, generation=self.generation
            )
            self._cuts.append(cut)
        return retirement

    def _check_generation(self, retirement: Retirement, has_cut: bool, *, is_quiet: bool) -> None:
        """A cut that drops pages is a generation; one with nothing in its scope is none.

        One that cuts nothing may be for the sake of leases and copies in flight, which then must drop theirs.
        """
        self.num_cuts += 1
        is_one = has_cut or (not is_quiet and retirement.generation > self.generation)
        self.generation += is_one
        text = f"generation {retirement.generation} after a cut, expected {self.generation}"
        demand(retirement.generation == self.generation, "metrics_agree", text)

    def _checked_preview(self, scope: Scope) -> Retirement:
        due = self._due(self._in_tree())
        preview = self._preview(scope)
        counts = {t.name.lower(): (preview.freed[t], preview.retired[t]) for t in self._cache.tier_pages}
        self._previews.append(Cut(due, {}, counts, held=frozenset(self._held_pages()), is_quiet=self._is_quiet()))
        return preview

    def _assign(self, applied: list[PendingCall], cuts: list[Cut], *, num_others: int) -> None:
        """Each flush that took effect has cut the pages it named. Up to `num_others` cuts may belong to releases."""
        is_right = len(applied) <= len(cuts) <= len(applied) + num_others
        choices = [zip(applied, chosen, strict=True) for chosen in combinations(cuts, len(applied))] if is_right else []
        pairs = [list(pairs) for pairs in choices]
        pairs = [each for each in pairs if all(cut.is_for(_key(call)) for call, cut in each)]
        if pairs:  # several, if a release cut as well: its cut looks the same
            for call, cut in (pair for each in pairs for pair in each):
                self._counts.setdefault(_key(call), []).append((cut.counts, cut.generation))
            return
        text = f"{len(cuts)} cuts, {len(applied)} flushes took effect"
        for call, cut in zip(applied, cuts, strict=False):
            text += f"; {call.message}: {_differ(cut.pages, cut.due.get(_key(call), {}))}"
        raise Violation("flush_is_exact", text)

    def _check_preview(self, call: PendingCall, answer: FlushResult, preview: Cut) -> None:
        due = preview.due[_key(call)]
        counted = _reported(answer)
        demand(counted == preview.counts, "counts_are_right", f"{call.message}: {counted}, saw {preview.counts}")
        for tier, pages in due.items():
            num_freed, num_held = counted[tier.name.lower()]
            text = f"{call.message}: {num_freed} and {num_held} pages on {tier.name}, in scope are {len(pages)}"
            demand(num_freed + num_held == len(pages), "counts_are_right", text)
            demand(not num_held or not preview.is_quiet, "counts_are_right", f"{text}, and none is held")
        num_held = counted["device"][1]
        num_read = len(due[Tier.DEVICE] & preview.held)
        demand(num_held >= num_read, "counts_are_right", f"{num_held} pages are held, requests read {num_read}")

    def adapter_cut_for(self, call: PendingCall) -> str | None:
        """The content that the cut of this turn for `call` was limited to; None: it was not, or there is none."""
        return next((cut.adapter for cut in self._cuts if cut.is_for(_key(call))), None)

    def _left_over(self, applied: list[PendingCall], cuts: list[Cut]) -> list[str]:
        """The contents of the cuts that no flush has asked for: those of names that changed."""
        left = list(cuts)
        for call in applied:
            own = next((cut for cut in left if cut.is_for(_key(call))), None)
            if own is not None:
                left.remove(own)
        return [cut.adapter for cut in left if cut.adapter is not None]

    def _adapters_due(self) -> dict[CallKey, str | None]:
        return {_key(call): self._retirements.adapter_in(flush) for call, flush in self._waiting()}

    def _due(self, in_tree: Pages) -> dict[CallKey, Pages]:
        return {_key(call): self._retirements.pages_in_scope(flush, in_tree) for call, flush in self._waiting()}

    def _waiting(self) -> Iterator[tuple[PendingCall, FlushCache]]:
        for key, call in self._calls.pending.items():
            if isinstance(call.message, FlushCache) and key not in self._counts:
                yield call, call.message

    def _in_tree(self) -> Pages:
        return {tier: frozenset(pages.pool.pages_of(Owner.TREE)) for tier, pages in self._cache.tier_pages.items()}


def _key(call: PendingCall) -> CallKey:
    message: Any = call.message
    return call.client, message.call_id


def _reported(answer: FlushResult) -> Counts:
    return {tier: (answer.freed[tier].pages, answer.retired[tier].pages) for tier in answer.freed}


def _differ(cut: Pages, due: Pages) -> str:
    return ", ".join(
        f"{tier.name}: pages {sorted(pages - due.get(tier, frozenset()))} beside it, "
        f"{sorted(due.get(tier, frozenset()) - pages)} left"
        for tier, pages in cut.items()
        if pages != due.get(tier)
    )
