"""All checks of one simulated engine, connected to it and to each other."""

from headwater.cache.page_pool import Owner
from headwater.cache.storage.names import StorageNames
from headwater.messages.base import Answer
from headwater.messages.cache import PinPrefix, Pins
from headwater.messages.control import Failed, FlushCache, FlushResult
from headwater.messages.state import Hello
from headwater.messages.wire import ToEngine
from headwater.simulation.checks.adapter_promises import AdapterPromises
from headwater.simulation.checks.control_promises import ControlPromises
from headwater.simulation.checks.cuts import Cuts
from headwater.simulation.checks.event_mirror import EventMirror
from headwater.simulation.checks.grammar_promises import GrammarPromises
from headwater.simulation.checks.metric_promises import MetricPromises
from headwater.simulation.checks.oracle import Oracle
from headwater.simulation.checks.pending_calls import PendingCalls
from headwater.simulation.checks.pin_promises import PinPromises
from headwater.simulation.checks.promises import Promises
from headwater.simulation.checks.retirements import Retirements
from headwater.simulation.checks.service_promises import ServicePromises
from headwater.simulation.checks.state_promises import StatePromises
from headwater.simulation.checks.sums import Sums
from headwater.simulation.checks.timeouts import TimeoutPromises
from headwater.simulation.checks.violation import demand
from headwater.simulation.engine_shape import VOCAB_SIZE
from headwater.simulation.fakes.drafter import FakeDrafter
from headwater.simulation.simulated_engine import GRAMMAR_LIMITS, MAX_CONTROL_TIMEOUT_S, SimulatedEngine

_LONGEST_NAP_S = 0.02 + 1e-9  # of a loop that waits for what sends no message


class EngineChecks:
    """Watches one engine from its construction on. Every method raises `Violation` for a broken promise."""

    def __init__(self, engine: SimulatedEngine, *, audit_every: int) -> None:
        self._engine = engine
        self.grammars = GrammarPromises(
            engine.grammars, jobs=engine.grammar_jobs, limits=GRAMMAR_LIMITS, clock=engine.clock
        )
        self.adapters = AdapterPromises(engine.parts.cache.tree, content_of=engine.content_of)
        self.oracle = self._make_oracle()
        engine.runner.audit = self.oracle
        pool = engine.parts.cache.pool
        engine.runner.is_any_free = lambda pages: pool.num_owned(pages, Owner.FREE) > 0
        if isinstance(engine.drafter, FakeDrafter):
            engine.drafter.right_tokens = self.oracle.right_tokens
        self.calls = PendingCalls(engine.clock, max_timeout_s=MAX_CONTROL_TIMEOUT_S)
        lower = engine.parts.cache.lower
        retirements = Retirements(
            engine.world,
            engine=self.oracle,
            device=engine.runner.kv,
            copied_at=engine.runner.copied_at,
            copier=engine.copier,
            prefetches=lambda: lower.storage.reader.prefetches if lower.storage else [],
            content_of_name=engine.parts.scheduler.adapters.id_of,  # AdapterPromises checks what it says
        )
        self.control = self._make_control(retirements)
        self.promises = Promises(
            engine.world,
            engine.parts,
            clock=engine.clock,
            runner=engine.runner,
            copier=engine.copier,
            jobs=engine.jobs,
            oracle=self.oracle,
            calls=self.calls,
            retirements=retirements,
            audit_every=audit_every,
        )
        self.pins = PinPromises(engine.parts, runner=engine.runner, copier=engine.copier, oracle=self.oracle)
        self.timeouts = TimeoutPromises(self.oracle, limits=engine.shape.limits(), now_s=engine.clock.now)
        self.sums = Sums(engine.parts.scheduler, has_requests=lambda: bool(self.oracle.active))
        self.state = StatePromises(engine.parts, oracle=self.oracle, is_paused=lambda: self.control.is_paused)
        self._mirror: EventMirror | None = None
        if engine.shape.has_events:
            self._mirror = EventMirror(engine.parts.cache.tree, StorageNames(engine.shape.fingerprint()))
            engine.parts.cache.observe(self._mirror.recorder)
        engine.wire.on_receive = self._received

    def answered(self, client: bytes, answer: Answer) -> None:
        """A client has got the answer of a call."""
        call = self.calls.answered(client, answer)
        self.control.answered(call, answer)
        self.pins.answered(call, answer)
        self.adapters.answered(answer)
        if isinstance(answer, Failed) and isinstance(call.message, FlushCache | PinPrefix):
            self.adapters.refused_call(call.message.lora_name, answer)
        if isinstance(answer, Pins) and isinstance(call.message, PinPrefix):
            self.adapters.pinned(call.message, answer)
        if isinstance(call.message, FlushCache) and isinstance(answer, FlushResult):
            self.grammars.check_flush(call.message, answer)
            self.metrics.answered(call, answer)

    def end_turn(self, *, has_launched: bool) -> None:
        """The turn is over, and all of its outputs and answers have been checked."""
        self.control.end_turn(has_launched=has_launched)
        self.metrics.check()
        self.sums.check()
        self.state.check()
        self.adapters.end_turn()
        self.timeouts.check()
        self.pins.check(has_launched=has_launched)
        self.grammars.check(self._engine.parts.scheduler.grammars)
        self.promises.check(is_staging=self.control.is_staging, mirror=self._mirror)

    # ------------------------------------------------------------------------------------------------

    def _received(self, wait_s: float, messages: list[tuple[bytes, ToEngine]]) -> None:
        if not messages:
            self.calls.check_sleep(wait_s)
            self._check_nap(wait_s)
            self.timeouts.check_sleep(wait_s)
        for client, message in messages:
            if isinstance(message, Hello):
                self.pins.said_hello(client)
            if isinstance(message, FlushCache) and "storage" in message.tiers:
                self._engine.expect_store_flush(message)
        self.control.begin_turn(messages)
        self.timeouts.note_due(slept_s=0.0 if messages else wait_s)

    def _check_nap(self, wait_s: float) -> None:
        """The ends of copies, calls of a store, compilations and reading weights send no message to a sleeping loop."""
        engine, weights = self._engine, self._engine.runner.weights
        if wait_s <= _LONGEST_NAP_S:
            return
        copies = engine.copier.open_copies if engine.copier is not None else []
        is_reading = bool(weights.staged) and not (weights.staged[-1].has_ended or weights.staged[-1].is_abandoned)
        calls = [job for job in engine.jobs.open_jobs if job.kind]  # no call waits for a store that is being closed
        is_open = copies or calls or engine.grammar_jobs.open_jobs or is_reading
        demand(not is_open, "ends_are_looked_for", f"the loop sleeps {wait_s} s while work is open whose end is silent")

    def _make_oracle(self) -> Oracle:
        engine, shape = self._engine, self._engine.shape
        return Oracle(
            engine.world,
            page_size=shape.page_size,
            vocab_size=VOCAB_SIZE,
            limits=shape.limits(),
            capacity_tokens=shape.num_pages * shape.page_size - 1,
            eos_token_ids=frozenset(shape.eos_token_ids),
            weights=engine.runner.weights,
            running=lambda: engine.parts.scheduler.running,
            pages_of=engine.runner.pages_of,
            records=engine.runner.records,
            is_shared=lambda page: engine.parts.cache.pool.owner_of(page) is Owner.TREE,
            now_s=engine.clock.now,
            grammars=self.grammars,
            adapters=self.adapters,
        )

    def _make_control(self, retirements: Retirements) -> ControlPromises:
        engine, parts = self._engine, self._engine.parts
        cuts = Cuts(
            parts.cache,
            retirements=retirements,
            calls=self.calls,
            held_pages=engine.held_pages,
            is_quiet=engine.is_quiet,
            note_adapter=self.adapters.cut,
        )
        service = ServicePromises(
            parts.scheduler,
            oracle=self.oracle,
            limits=engine.shape.limits(),
            is_fcfs=engine.shape.policy == "fcfs",
            advance=parts.control.advance,
            is_quiet=engine.is_quiet,
        )
        parts.control.advance = service.checked_advance  # type: ignore[method-assign]
        self.metrics = MetricPromises(parts.report, cuts=cuts, now_s=engine.clock.now)
        return ControlPromises(
            engine.world,
            oracle=self.oracle,
            calls=self.calls,
            retirements=retirements,
            cuts=cuts,
            service=service,
            live_pins=lambda: {pin.pin_id: bool(pin.lease and pin.lease.retirements) for pin in parts.pinning.pins},
            weights=engine.runner.weights,
            phases=lambda: {info.call_id: info.phase for info in parts.control.pending.infos()},
        )
