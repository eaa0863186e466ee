"""Random runs: engines, requests, operations and faults, all from one seed."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec

from headwater.cache.storage_tier import PrefetchPolicy
from headwater.cache.write_policy import WritePolicy
from headwater.messages import (
    Abort,
    AttachStorage,
    CancelOperation,
    ContinueGeneration,
    DetachStorage,
    FlushCache,
    Generate,
    GetCacheTree,
    GetOperations,
    GetPins,
    GetState,
    LogprobParams,
    PauseGeneration,
    Ping,
    PinPrefix,
    ReleaseMemory,
    ResumeMemory,
    SamplingParams,
    SetWeightVersion,
    ToEngine,
    UnpinPrefix,
    UpdateWeights,
    pack_ids,
)
from headwater.simulation.driver import VOCAB_SIZE, EngineShape
from headwater.simulation.events import ComeBack, Deliver, Event, Faults, FollowUp, Turns
from headwater.simulation.profiles import Profile

_CLIENTS = ("one", "two")
_NAMESPACES = (  # salts and keys that the requests of a run choose from
    (("",), ("",)),
    (("", "", "", "salt"), ("", "", "key")),
)


class Workload:
    """Knows what it has sent, and nothing of what came of it: a run can be cut and is still a run."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self._source = source = random.Random(seed)
        self._profile = profile
        self._stems = self._make_stems()
        self._zipf = [rank**-0.8 for rank in range(1, len(self._stems) + 1)]
        self._salts, self._keys = source.choice(_NAMESPACES)
        self._num_sent = 0
        self._recent: deque[str] = deque(maxlen=12)  # rids
        self._calls: deque[tuple[int, str, str]] = deque(maxlen=8)  # engine, client, call id
        self._due: list[tuple[int, Event]] = []  # what ends a pause or a release, and after how many events
        is_cache_enabled = source.random() < 0.97
        has_host = is_cache_enabled and source.random() < profile.has_host
        has_store = has_host and source.random() < profile.has_store
        self.store_bytes = source.choice(profile.store_bytes) if has_store else 0
        num_engines = 2 if has_store and source.random() < profile.has_two_engines else 1
        shapes = [self._make_shape(has_host=has_host) for _ in range(num_engines)]
        self.shapes = tuple(replace(shape, is_cache_enabled=is_cache_enabled) for shape in shapes)

    def events(self) -> Iterator[Event]:
        """What happens, without end."""
        yield self._faults()
        weighted = self._weighted()
        actions, weights = list(weighted), list(weighted.values())
        while True:
            yield from self._take_due()
            yield from self._source.choices(actions, weights)[0]()
            count = self._source.choice([0, 1, 1, 2, 2, 3, 5])
            if count:
                yield Turns(count, self._source.choice([0.0, 0.001, 0.01, 0.01, 0.1]))
            if self._source.random() < 0.03:
                yield self._faults()
            if self._source.random() < 0.05:
                yield ComeBack()

    def _weighted(self) -> dict[Callable[[], Iterator[Event]], int]:
        profile = self._profile
        return {
            self._request: profile.requests,
            self._follow_up: profile.follow_ups,
            self._burst: profile.bursts,
            self._abort: profile.aborts,
            self._flush: profile.flushes,
            self._pause: profile.pauses,
            self._update: profile.updates,
            self._release: profile.releases,
            self._relabel: profile.relabels,
            self._cancel: profile.cancels,
            self._pin: profile.pins,
            self._attach: profile.attaches if self.store_bytes else 0,
            self._question: profile.questions,
            self._quiet: profile.quiet,
        }

    # --- engines ------------------------------------------------------------------------------------

    def _make_shape(self, *, has_host: bool) -> EngineShape:
        source = self._source
        return EngineShape(
            num_pages=source.choice(self._profile.num_device_pages),
            max_running=source.choice([2, 4, 6]),
            max_step_tokens=source.choice([16, 64]),
            prefill_chunk_tokens=source.choice([7, 32]),
            max_queued=source.choice([6, 40]),
            max_context=80,
            is_async=source.random() < 0.5,
            policy=source.choice(["fcfs", "lpm"]),
            eos_token_ids=tuple(source.sample(range(VOCAB_SIZE), 30)),
            num_host_pages=source.choice(self._profile.num_host_pages) if has_host else 0,
            write_policy=source.choice(list(WritePolicy)),
            prefetch_policy=source.choice(list(PrefetchPolicy)),
            seed=source.randrange(1 << 30),
        )

    def _make_stems(self) -> list[list[int]]:
        """Prefixes that requests share; many begin as another one does."""
        stems: list[list[int]] = []
        for _ in range(self._source.choice(self._profile.num_stems)):
            head = self._source.choice(stems) if stems and self._source.random() < 0.6 else []
            head = head[: self._source.randrange(len(head) + 1)]
            stems.append(head + self._tokens(self._source.randrange(4, 45)))
        return stems

    def _faults(self) -> Faults:
        source, level = self._source, self._profile.fault_level
        if level == 0 or source.random() < 0.3 / level:
            return Faults()

        def sometimes(value: float) -> float:
            return value * level if source.random() < 0.4 else 0.0

        return Faults(
            copy_polls=source.choice([0, 2, 10, 40]),
            copy_failures=sometimes(0.15),
            job_polls=source.choice([0, 3, 15]),
            job_hangs=sometimes(0.05),
            staging_polls=source.choice([0, 3, 20]),
            store_fails=sometimes(0.2),
            store_writes_late=sometimes(0.1),
            store_flips=sometimes(0.2),
            store_full=sometimes(0.1),
            store_is_read_only=source.random() < 0.15,
        )

    # --- requests -----------------------------------------------------------------------------------

    def _request(self) -> Iterator[Event]:
        yield Deliver(self._generate(self._prompt()), self._client(), self._engine())

    def _follow_up(self) -> Iterator[Event]:
        if self._recent:
            parent = self._source.choice(self._recent)
            more = self._tokens(self._source.randrange(1, 6))
            yield FollowUp(self._generate(more), self._client(), parent, self._engine())

    def _burst(self) -> Iterator[Event]:
        stem = self._stem()
        for _ in range(self._source.randrange(3, 12)):
            tail = self._tokens(self._source.randrange(1, 4))
            yield Deliver(self._generate(stem + tail), self._client(), self._engine())

    def _abort(self) -> Iterator[Event]:
        rid = self._source.choice(self._recent) if self._recent else "r0"
        match = self._source.choices(["exact", "prefix", "all"], [12, 1, 1])[0]
        yield self._call(lambda call_id: Abort(call_id=call_id, rid=rid, match=match))  # type: ignore[arg-type]

    def _generate(self, prompt: list[int]) -> Generate:
        source = self._source
        self._num_sent += 1
        rid = f"r{self._num_sent}"
        self._recent.append(rid)
        logprobs = None
        if source.random() < 0.1:
            logprobs = LogprobParams(prompt_start=source.choice([-1, 0, len(prompt) // 2]))
        return Generate(
            rid=rid,
            prompt_ids=pack_ids(prompt),
            sampling=SamplingParams(
                max_new_tokens=source.choice([0, 1, 3, 8, 8, 20, 40]),
                min_new_tokens=source.choice([0, 0, 0, 4]),
                ignore_eos=source.random() < 0.3,
            ),
            logprobs=logprobs,
            cache_salt=source.choice(self._salts),
            extra_key=source.choice(self._keys),
            priority=source.choice([0, 0, 0, 1]),
            no_store=source.random() < 0.06,
        )

    # --- operations ---------------------------------------------------------------------------------

    def _flush(self) -> Iterator[Event]:
        source = self._source
        tiers = self._tiers()
        fields: dict[str, object] = {}
        if source.random() < 0.3:
            fields["cache_salt"] = source.choice(self._salts)
        if source.random() < 0.2:
            fields["extra_key"] = source.choice(self._keys)
        if source.random() < 0.3 and "storage" not in tiers:
            stem = self._stem()
            fields["prefix_ids"] = pack_ids(stem[: source.randrange(1, len(stem) + 1)])
        fields |= {
            "mode": source.choice(["idle", "idle", "now", "drain"]),
            "timeout_s": source.choice([0.0, 0.0, 0.005, 0.5, 20.0]),
            "hold": source.random() < 0.3,
            "dry_run": source.random() < 0.1,
        }
        engine = self._engine()
        flush = FlushCache(call_id="", tiers=tiers, **fields)  # type: ignore[arg-type]
        yield self._call(lambda call_id: msgspec.structs.replace(flush, call_id=call_id), engine)
        if "storage" in tiers:  # who comes while the store has not acknowledged finds nothing in it
            yield Turns(source.choice([1, 2]), 0.001)
            for _ in range(3):
                yield Deliver(self._generate([*self._stem(), 1]), self._client(), engine)

    def _tiers(self) -> tuple[str, ...]:
        choices: list[tuple[str, ...]] = [(), ()]
        if self.shapes[0].num_host_pages:
            choices += [("host",), ("device",), ("device", "host")]
        if self.store_bytes:
            choices += [("device", "host", "storage"), ("device", "host", "storage"), ("storage",)]
        return self._source.choice(choices)

    def _pause(self) -> Iterator[Event]:
        mode = self._source.choice(["abort", "retract", "in_place"])
        engine = self._engine()
        yield self._call(lambda call_id: PauseGeneration(call_id=call_id, mode=mode), engine)  # type: ignore[arg-type]
        self._later(self._call(lambda call_id: ContinueGeneration(call_id=call_id), engine))

    def _update(self) -> Iterator[Event]:
        source = self._source
        path = f"w{source.randrange(3)}" if source.random() < 0.8 else "corrupt"
        yield self._call(
            lambda call_id: UpdateWeights(
                call_id=call_id,
                path=path,
                weight_version=source.choice([None, "label"]),
                abort_all_requests=source.random() < 0.2,
                timeout_s=source.choice([0.01, 20.0, 20.0]),
            )
        )

    def _release(self) -> Iterator[Event]:
        tags = self._source.choice([(), ("kv_cache",), ("weights",)])
        timeout_s = self._source.choice([0.0, 0.5, 5.0])
        engine = self._engine()
        yield self._call(lambda call_id: ReleaseMemory(call_id=call_id, tags=tags, timeout_s=timeout_s), engine)
        self._later(self._call(lambda call_id: ResumeMemory(call_id=call_id, timeout_s=100.0), engine))

    def _relabel(self) -> Iterator[Event]:
        ends_all = self._source.random() < 0.2
        yield self._call(
            lambda call_id: SetWeightVersion(call_id=call_id, weight_version="new", abort_all_requests=ends_all)
        )

    def _cancel(self) -> Iterator[Event]:
        if self._calls:
            engine, client, started = self._source.choice(self._calls)
            message = CancelOperation(call_id=self._call_id(), started_by_call=started)
            yield Deliver(message, client, engine)

    def _pin(self) -> Iterator[Event]:
        source = self._source
        if source.random() < 0.3:
            yield self._call(lambda call_id: UnpinPrefix(call_id=call_id, pin_id=f"pin-{source.randrange(1, 9)}"))
            return
        yield self._call(
            lambda call_id: PinPrefix(
                call_id=call_id,
                prompt_ids=pack_ids(self._stem()),
                ttl_s=source.choice([0.05, 1.0, 30.0]),
                cache_salt=source.choice(self._salts),
                extra_key=source.choice(self._keys),
            )
        )

    def _attach(self) -> Iterator[Event]:
        engine = self._engine()
        if self._source.random() < 0.6:
            yield self._call(lambda call_id: DetachStorage(call_id=call_id), engine)
            self._later(self._call(lambda call_id: AttachStorage(call_id=call_id, kind="memory"), engine))
            return
        yield self._call(lambda call_id: AttachStorage(call_id=call_id, kind="memory", timeout_s=1.0), engine)

    def _question(self) -> Iterator[Event]:
        ask = self._source.choice([GetState, GetOperations, Ping, GetPins, GetCacheTree])
        yield self._call(lambda call_id: ask(call_id=call_id))

    def _quiet(self) -> Iterator[Event]:
        yield Turns(self._source.choice([5, 40]), self._source.choice([0.001, 0.3, 2.0]))

    # ------------------------------------------------------------------------------------------------

    def _later(self, event: Event) -> None:
        self._due.append((self._source.randrange(1, 12), event))

    def _take_due(self) -> Iterator[Event]:
        self._due = [(count - 1, event) for count, event in self._due]
        yield from [event for count, event in self._due if count <= 0]
        self._due = [(count, event) for count, event in self._due if count > 0]

    def _call(self, make: Callable[[str], ToEngine], engine: int | None = None) -> Deliver:
        call_id = self._call_id()
        client = self._client()
        engine = self._engine() if engine is None else engine
        self._calls.append((engine, client, call_id))
        return Deliver(make(call_id), client, engine)

    def _call_id(self) -> str:
        self._num_sent += 1
        return f"c{self._num_sent}"

    def _engine(self) -> int:
        return self._source.randrange(len(self.shapes))

    def _client(self) -> str:
        return self._source.choice(_CLIENTS)

    def _stem(self) -> list[int]:
        return self._source.choices(self._stems, self._zipf)[0]

    def _prompt(self) -> list[int]:
        if self._source.random() < 0.1:
            return self._tokens(self._source.randrange(1, 90))  # some are longer than the context
        stem = self._stem()
        cut = len(stem) if self._source.random() < 0.6 else self._source.randrange(1, len(stem) + 1)
        return stem[:cut] + self._tokens(self._source.randrange(6)) or [1]

    def _tokens(self, count: int) -> list[int]:
        return [self._source.randrange(VOCAB_SIZE) for _ in range(count)]
