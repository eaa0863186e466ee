"""Puts the parts of an engine together. No torch: the server, the tests and the simulation all start here."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from headwater.cache.host_tier import HostTier
from headwater.cache.jobs import JobRunner, ThreadJobRunner
from headwater.cache.prefix_cache import MIN_PART_TOKENS, PrefixCache
from headwater.cache.statistics.residency import Residency
from headwater.cache.storage.names import StorageNames
from headwater.cache.storage.tier import StorageSettings
from headwater.clock import Clock
from headwater.control.control_plane import ControlPlane
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.orders import Orders
from headwater.control.pinning import Pinning
from headwater.control.storage_control import StorageControl
from headwater.engine.blockers import Blockers
from headwater.engine.kv_events_publisher import KvEventsPublisher, KvEventsSettings
from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.engine.loop import EngineLoop
from headwater.engine.ports import ModelRunner
from headwater.engine.report import StateReporter
from headwater.engine.snapshot import Snapshots
from headwater.engine.steps import Steps
from headwater.engine.wire import Wire
from headwater.grammars.matcher import GrammarCompiler
from headwater.messages.state import EngineReady
from headwater.scheduling.adapters import AdapterBoard
from headwater.scheduling.grammar_queue import GrammarLimits, GrammarQueue
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.scheduler import Scheduler
from headwater.scheduling.speculation.drafters import NO_SPECULATION, SpeculationSettings
from headwater.scheduling.waiting_queue import SchedulePolicy
from headwater.storage.backend import StorageBackend
from headwater.storage.page_key import Fingerprint
from headwater.storage.registry import open_backend

_NO_FINGERPRINT = Fingerprint(  # of an engine that has no pages worth storing: tests
    weights_id="", model_config_hash="", kv_dtype="", page_size=0, num_layers=0, num_kv_heads=0, head_dim=0
)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The loop and what it is made of; tests and the simulation look inside."""

    loop: EngineLoop
    scheduler: Scheduler
    cache: PrefixCache
    control: ControlPlane
    blockers: Blockers
    storage: StorageControl
    pinning: Pinning
    orders: Orders
    report: StateReporter


def wire_engine(
    *,
    wire: Wire,
    runner: ModelRunner,
    ready: EngineReady,
    limits: SchedulerLimits,
    clock: Clock,
    policy: SchedulePolicy = "fcfs",
    is_cache_enabled: bool = True,
    host: HostTier | None = None,
    max_control_timeout_s: float = 3600.0,
    memory_bytes: dict[str, int] | None = None,
    fingerprint: Fingerprint | None = None,
    jobs: JobRunner | None = None,
    storage_settings: StorageSettings | None = None,
    storage_opener: Callable[..., StorageBackend] = open_backend,
    kv_events: KvEventsSettings | None = None,
    min_part_tokens: int = MIN_PART_TOKENS,
    grammar_compiler: GrammarCompiler | None = None,
    grammar_jobs: JobRunner | None = None,
    grammar_limits: GrammarLimits | None = None,
    speculation: SpeculationSettings = NO_SPECULATION,
) -> EngineParts:
    """An engine around `runner`, whose facts are in `ready`. Without a compiler, it refuses grammars."""
    cache = PrefixCache(
        num_pages=ready.num_pages,
        page_size=ready.page_size,
        page_bytes=ready.page_bytes,
        clock=clock,
        host=host,
        is_enabled=is_cache_enabled,
        min_part_tokens=min_part_tokens,
    )
    for tier_pages in cache.tier_pages.values():
        tier_pages.residency = Residency(clock)
    scheduler = Scheduler(
        cache,
        limits=limits,
        clock=clock,
        weights_id=ready.weights_id,
        weight_version=ready.weight_version,
        eos_token_ids=frozenset(ready.eos_token_ids),
        policy=policy,
        vocab_size=ready.vocab_size,
        grammars=GrammarQueue(grammar_compiler, clock=clock, jobs=grammar_jobs, limits=grammar_limits),
        speculation=speculation,
    )
    if runner.adapters is not None:
        scheduler.adapters = AdapterBoard(runner.adapters.num_slots)
        scheduler.adapters.clear_slot = runner.adapters.clear
    steps = Steps(scheduler, runner)
    blockers = Blockers()
    blockers.register("scheduler", scheduler)
    blockers.register("cache", cache.lower)
    storage = StorageControl(
        cache,
        fingerprint=fingerprint or _NO_FINGERPRINT,
        jobs=jobs or ThreadJobRunner(name="storage"),
        clock=clock,
        settings=storage_settings or StorageSettings(),
        opener=storage_opener,
    )
    names = StorageNames(fingerprint or _NO_FINGERPRINT)
    pinning = Pinning(scheduler)
    orders = Orders()
    engine = ControlledEngine(
        scheduler=scheduler,
        storage=storage,
        pinning=pinning,
        weights=runner.weights,
        kv_memory=runner.kv_memory,
        adapters=runner.adapters,
        orders=orders,
        blockers=blockers,
        is_step_in_flight=steps.is_step_in_flight,
        clock=clock,
    )
    control = ControlPlane(engine, clock=clock, max_timeout_s=max_control_timeout_s)
    blockers.register("control", control)
    report = StateReporter(
        clock=clock,
        scheduler=scheduler,
        cache=cache,
        control=control,
        blockers=blockers,
        flushes=engine.flushes,
        memory_bytes=memory_bytes or {},
    )
    loop = EngineLoop(
        wire=wire,
        scheduler=scheduler,
        control=control,
        steps=steps,
        ready=ready,
        report=report,
        snapshots=Snapshots(
            cache=cache, report=report, control=control, storage=storage, pinning=pinning, clock=clock
        ),
        pinning=pinning,
        clock=clock,
        names=names,
        kv_events=_publisher(kv_events, cache, names, scheduler),
    )
    return EngineParts(
        loop=loop,
        scheduler=scheduler,
        cache=cache,
        control=control,
        blockers=blockers,
        storage=storage,
        pinning=pinning,
        orders=orders,
        report=report,
    )


def _publisher(
    settings: KvEventsSettings | None, cache: PrefixCache, names: StorageNames, scheduler: Scheduler
) -> KvEventsPublisher | None:
    if settings is None:
        return None
    recorder = KvEventsRecorder(
        cache.tree, names, epoch=secrets.token_hex(8), name_of_adapter=scheduler.adapters.name_of
    )
    cache.observe(recorder)
    return KvEventsPublisher(recorder, settings)
