"""The events of a random run (engines, requests, operations and faults), all from one seed."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

from headwater.cache.host_tier import WritePolicy
from headwater.cache.storage.tier import PrefetchPolicy
from headwater.simulation.engine_shape import VOCAB_SIZE, EngineShape
from headwater.simulation.random_runs.callers import Callers
from headwater.simulation.random_runs.events import ComeBack, Event, Turns
from headwater.simulation.random_runs.operations import Operators
from headwater.simulation.random_runs.profiles import Profile
from headwater.simulation.random_runs.prompts import Prompts
from headwater.simulation.random_runs.requests import Requests
from headwater.simulation.random_runs.trouble import Trouble

_DRAFTS: tuple[Literal["fake", "tree"], ...] = ("fake", "fake", "tree")


class Workload:
    """Makes events from its seed and its earlier events, never from their results, so a run can be shortened.

    A seed must always mean the same run, so that a failed seed remains a test. Additions to this code must not draw
    random numbers in profiles without them.
    """

    def __init__(self, seed: int, profile: Profile) -> None:
        self._source = source = random.Random(seed)
        self._profile = profile
        self._prompts = Prompts(source, profile)
        self._callers = Callers(source)
        is_cache_enabled = source.random() < 0.97
        has_host = is_cache_enabled and source.random() < profile.has_host
        has_store = has_host and source.random() < profile.has_store
        self.store_bytes = source.choice(profile.store_bytes) if has_store else 0
        self._callers.num_engines = 2 if has_store and source.random() < profile.has_two_engines else 1
        shapes = [self._make_shape(has_host=has_host) for _ in range(self._callers.num_engines)]
        has_events = profile.has_events > 0 and source.random() < profile.has_events
        page_size = source.choice(profile.page_sizes) if len(profile.page_sizes) > 1 else profile.page_sizes[0]
        self.shapes = tuple(
            replace(
                shape,
                is_cache_enabled=is_cache_enabled,
                has_events=has_events,
                page_size=page_size,
                num_pages=shape.num_pages * 4 // page_size,
                num_host_pages=shape.num_host_pages * 4 // page_size,
            )
            for shape in shapes
        )
        self._requests = Requests(
            source,
            prompts=self._prompts,
            callers=self._callers,
            grammars=profile.grammars,
            end_ids=self.shapes[0].eos_token_ids + self.shapes[-1].eos_token_ids,
            has_pooling=profile.has_pooling,
            has_adapters=profile.adapters > 0,
        )
        self._operations = Operators(
            source,
            prompts=self._prompts,
            callers=self._callers,
            requests=self._requests,
            has_host=has_host,
            has_store=has_store,
            has_split_flushes=profile.has_split_flushes and has_store,
            pin_s=profile.pin_s,
            has_pins_on_host=profile.has_pins_on_host,
            adapter_scopes=profile.adapter_scopes,
        )
        self._trouble = Trouble(source, profile, callers=self._callers, requests=self._requests, has_store=has_store)

    def events(self) -> Iterator[Event]:
        """An endless stream of events."""
        yield self._trouble.faults()
        weighted = self._weighted()
        actions, weights = list(weighted), list(accumulate(weighted.values()))
        while True:
            yield from self._callers.take_due()
            yield from self._source.choices(actions, cum_weights=weights)[0]()
            count = self._source.choice([0, 1, 1, 2, 2, 3, 5])
            if count:
                yield Turns(count, self._source.choice([0.0, 0.001, 0.01, 0.01, 0.1]))
            if self._source.random() < 0.03:
                yield self._trouble.faults()
            if self._source.random() < 0.05:
                yield ComeBack()

    def _weighted(self) -> dict[Callable[[], Iterator[Event]], int]:
        profile, requests, operations, trouble = self._profile, self._requests, self._operations, self._trouble
        return {
            requests.request: profile.requests,
            requests.follow_up: profile.follow_ups,
            requests.burst: profile.bursts,
            requests.abort: profile.aborts,
            operations.flush: profile.flushes,
            operations.pause: profile.pauses,
            operations.update: profile.updates,
            operations.release: profile.releases,
            operations.relabel: profile.relabels,
            operations.cancel: profile.cancels,
            operations.pin: profile.pins,
            operations.attach: profile.attaches if self.store_bytes else 0,
            operations.question: profile.questions,
            self._quiet: profile.quiet,
            operations.adapter: profile.adapters,
            operations.inspection: profile.inspections,
            operations.everywhere: profile.flushes_everywhere,
            operations.warming: profile.warmings,
            trouble.disconnect: profile.disconnects,
            trouble.nonsense: profile.nonsense,
            trouble.crash: profile.crashes,
        }

    def _quiet(self) -> Iterator[Event]:
        yield Turns(self._source.choice([5, 40]), self._source.choice([0.001, 0.3, 2.0]))

    def _make_shape(self, *, has_host: bool) -> EngineShape:
        source = self._source
        return EngineShape(
            num_pages=source.choice(self._profile.num_device_pages),
            max_running=source.choice([2, 4, 6]),
            max_step_tokens=source.choice([16, 64]),
            prefill_chunk_tokens=source.choice([7, 32]),
            max_queued=source.choice([6, 40]),
            max_context=80,
            min_part_tokens=1,
            is_async=source.random() < 0.5,
            policy=source.choice(["fcfs", "lpm"]),
            eos_token_ids=tuple(source.sample(range(VOCAB_SIZE), 30)),
            num_host_pages=source.choice(self._profile.num_host_pages) if has_host else 0,
            write_policy=source.choice(list(WritePolicy)),
            prefetch_policy=source.choice(list(PrefetchPolicy)),
            seed=source.randrange(1 << 30),
            num_ranks=source.choice(self._profile.num_ranks) if len(self._profile.num_ranks) > 1 else 1,
            **(self._limits() if self._profile.has_limits else {}),
            drafts=source.choice(_DRAFTS) if self._profile.has_drafts else "none",
        )

    def _limits(self) -> dict[str, Any]:
        source = self._source
        return {
            "max_queued_tokens": source.choice([None, 60, 200]),
            "max_queue_share": source.choice([1.0, 0.5, 0.3]),
            "queue_timeout_s": source.choice([None, 0.2, 1.0]),
            "request_timeout_s": source.choice([None, 0.5, 3.0]),
        }
