"""One engine of the simulation: the real loop, scheduler, cache and control plane, wired to fakes."""

from typing import Any

from headwater.cache.host_tier import HostTier
from headwater.cache.storage.tier import StorageSettings
from headwater.clock import ManualClock
from headwater.engine.wiring import EngineParts, wire_engine
from headwater.messages.control import FlushCache
from headwater.scheduling.grammar_queue import GrammarLimits
from headwater.scheduling.speculation.drafters import SpeculationSettings
from headwater.simulation.engine_shape import VOCAB_SIZE, EngineShape
from headwater.simulation.fakes.copier import FakeCopier
from headwater.simulation.fakes.drafter import CheckedTreeDrafter, make_drafter
from headwater.simulation.fakes.grammar import FakeCompiler
from headwater.simulation.fakes.jobs import FakeJobRunner
from headwater.simulation.fakes.kv_records import HostRecords
from headwater.simulation.fakes.ranks import SimulatedRanks
from headwater.simulation.fakes.runner import FakeRunner
from headwater.simulation.fakes.shared_world import SharedWorld
from headwater.simulation.fakes.store import StampedBackend
from headwater.simulation.fakes.wire import MemoryWire
from headwater.storage.backend import StorageBackend
from headwater.storage.page_key import scope_id

MAX_CONTROL_TIMEOUT_S = 3600.0
GRAMMAR_LIMITS = GrammarLimits(compile_timeout_s=2.0, max_cached=3)


class SimulatedEngine:
    """The parts of an engine around a fake wire, runner, copier and jobs, in virtual time. `Driver` turns it."""

    def __init__(self, shape: EngineShape, world: SharedWorld, settings: StorageSettings | None = None) -> None:
        self.shape = shape
        self.world = world
        self.clock = ManualClock()
        self.wire = MemoryWire(self.clock)
        self.runner = FakeRunner(
            num_pages=shape.num_pages,
            page_size=shape.page_size,
            max_running=shape.max_running,
            vocab_size=VOCAB_SIZE,
            is_async=shape.is_async,
            max_context=shape.max_context,
        )
        self.runner.weights.current = shape.weights_id
        self.jobs = FakeJobRunner(seed=shape.seed, clock=self.clock)
        self.grammar_jobs = FakeJobRunner(seed=shape.seed + 1, clock=self.clock)
        self.grammars = FakeCompiler(vocab_size=VOCAB_SIZE, end_ids=frozenset(shape.eos_token_ids))
        self.drafter = make_drafter(shape.drafts, seed=shape.seed, vocab_size=VOCAB_SIZE)
        self.copier = self._make_copier() if shape.num_host_pages else None
        self.ranks = None
        if shape.num_ranks > 1:
            self.ranks = SimulatedRanks(self.runner, self.copier, shape=shape, make_copier=self._copier_of)
        self.store: StorageBackend | None = None  # the one that `AttachStorage` attaches
        self._scope_domain = shape.fingerprint().scope_domain()
        self._scopes_due: set[bytes] = set()  # counters that flushes of a store have named
        self.parts = self._wire(
            settings or StorageSettings(policy=shape.prefetch_policy, min_prefetch_tokens=shape.page_size)
        )
        if isinstance(self.drafter, CheckedTreeDrafter):
            self.drafter.tree = self.parts.cache.tree
        if self.ranks is not None:
            self.parts.loop.call_each_turn(self.ranks.begin_turn)

    def attach(self, backend: StorageBackend) -> None:
        """Attach a store. Its calls are carried out when the loop polls them."""
        self.parts.storage.attach_backend(self._stamped(backend))

    def expect_store_flush(self, flush: FlushCache) -> None:
        """From now on, a store may be asked to raise the counter of this flush."""
        named = scope_id(self._scope_domain, cache_salt=flush.cache_salt, extra_key=flush.extra_key)
        self._scopes_due.add(named)

    def is_quiet(self) -> bool:
        """Whether no lease, host page or step is in use, and no blocker exists."""
        cache = self.parts.cache
        return not (cache.leases or cache.lower.holds or self.runner.open_steps or self.parts.blockers())

    def content_of(self, slot: int) -> str:
        """The adapter that the runner computes with in a slot of its adapters; "" for slot 0."""
        return self.runner.adapters.content_of(slot)

    def held_pages(self) -> set[int]:
        """Device pages that running requests hold."""
        leases = [request.lease for request in self.parts.scheduler.running if request.lease is not None]
        return {page for lease in leases for page in lease.page_table().tolist()}

    # ------------------------------------------------------------------------------------------------

    def _make_copier(self) -> FakeCopier:
        copier = self._copier_of(self.runner, self.shape.seed)
        copier.failure_rate = self.shape.copy_failure_rate
        return copier

    def _copier_of(self, runner: FakeRunner, seed: int) -> FakeCopier:
        copier = FakeCopier(runner.kv, num_host_pages=self.shape.num_host_pages, seed=seed)
        copier.max_polls = self.shape.max_copy_polls
        copier.steps = runner
        copier.turn = lambda: self.world.turn
        runner.wait_for_restores = copier.wait
        return copier

    def _host(self) -> HostTier | None:
        if self.copier is None:
            return None
        return HostTier(
            num_pages=self.shape.num_host_pages,
            copier=self.copier if self.ranks is None else self.ranks.over_all(self.copier),
            pages=HostRecords(self.copier.host),
            policy=self.shape.write_policy,
            min_restore_tokens=self.shape.page_size,
        )

    def _wire(self, settings: StorageSettings) -> EngineParts:
        return wire_engine(
            wire=self.wire,
            runner=self.runner if self.ranks is None else self.ranks.runner,
            ready=self.shape.ready(),
            limits=self.shape.limits(),
            clock=self.clock,
            policy=self.shape.policy,
            is_cache_enabled=self.shape.is_cache_enabled,
            host=self._host(),
            max_control_timeout_s=MAX_CONTROL_TIMEOUT_S,
            fingerprint=self.shape.fingerprint(),
            jobs=self.jobs,
            storage_settings=settings,
            storage_opener=self._open_store,
            min_part_tokens=self.shape.min_part_tokens,
            grammar_compiler=self.grammars,
            grammar_jobs=self.grammar_jobs,
            grammar_limits=GRAMMAR_LIMITS,
            speculation=SpeculationSettings(drafter=self.drafter),
        )

    def _open_store(self, kind: str, **options: Any) -> StorageBackend:
        if self.store is None:
            raise ValueError("there is no store to attach")
        return self._stamped(self.store)

    def _stamped(self, backend: StorageBackend) -> StampedBackend:
        return StampedBackend(backend, turn=lambda: self.world.turn, due=self._scopes_due)
