"""The real loop, scheduler, cache and control plane around fakes, a turn at a time, and checked after each."""

from dataclasses import dataclass, field
from typing import Any

from headwater.cache.host_tier import HostTier, WritePolicy
from headwater.cache.storage.names import StorageNames
from headwater.cache.storage.tier import PrefetchPolicy, StorageSettings
from headwater.clock import ManualClock
from headwater.engine.wiring import EngineParts, wire_engine
from headwater.messages.base import pack_ids, unpack_ids
from headwater.messages.control import FlushCache
from headwater.messages.generation import (
    Abort,
    Finish,
    Generate,
    GenerateBatch,
    LogprobParams,
    Output,
    OutputMeta,
    Outputs,
    RequestOptions,
    SamplingParams,
    TokenLogprob,
)
from headwater.messages.state import EngineReady
from headwater.messages.weights import SetWeightVersion
from headwater.messages.wire import ToClient, ToEngine
from headwater.scheduling.scheduler import SchedulerLimits
from headwater.scheduling.waiting_queue import SchedulePolicy
from headwater.simulation.checks.control_promises import ControlPromises
from headwater.simulation.checks.cuts import Cuts
from headwater.simulation.checks.event_mirror import EventMirror
from headwater.simulation.checks.oracle import Oracle
from headwater.simulation.checks.pending_calls import Calls
from headwater.simulation.checks.promises import Promises
from headwater.simulation.checks.retirements import Retirements
from headwater.simulation.checks.service_promises import ServicePromises
from headwater.simulation.checks.violation import Violation
from headwater.simulation.fakes.copier import FakeCopier, StepPages
from headwater.simulation.fakes.jobs import FakeJobRunner
from headwater.simulation.fakes.kv_records import HostRecords
from headwater.simulation.fakes.runner import FakeRunner, StepFault
from headwater.simulation.fakes.shared_world import World
from headwater.simulation.fakes.store import StampedBackend
from headwater.simulation.fakes.wire import MemoryWire
from headwater.storage.backend import StorageBackend
from headwater.storage.page_key import Fingerprint, scope_id

VOCAB_SIZE = 1000
CLIENT = b"client"
MAX_CONTROL_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Sizes and policies of one simulated engine, and how its copies go."""

    num_pages: int = 64
    page_size: int = 4
    max_running: int = 8
    max_step_tokens: int = 64
    prefill_chunk_tokens: int = 32
    max_queued: int = 1000
    max_context: int = 4096
    is_async: bool = False  # a step is never done in the turn that launched it, as on a GPU
    policy: SchedulePolicy = "fcfs"
    eos_token_ids: tuple[int, ...] = ()
    is_cache_enabled: bool = True
    num_host_pages: int = 0
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    max_copy_polls: int = 0  # a copy takes up to so many turns
    copy_failure_rate: float = 0.0
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.TIMEOUT
    weights_id: str = "w0"
    seed: int = 0
    has_events: bool = False  # the events of the cache are recorded, and held against it


@dataclass
class Answer:
    """What a request has said so far."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    meta: OutputMeta | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, output: Output) -> None:
        self.tokens += output.token_ids
        self.logprobs += output.logprobs or ()
        self.prompt_logprobs += output.prompt_logprobs or ()
        self.finish = output.finish
        self.meta = output.meta or self.meta


class Driver:
    """An engine in the hands of a test. Every read, answer and deadline is checked; see docs/reliability.md.

    Raises `Violation` from `turn`. The whole books of the cache are audited every `audit_every` turns, the rest
    every turn.
    """

    def __init__(
        self,
        shape: EngineShape | None = None,
        *,
        world: World | None = None,
        backend: StorageBackend | None = None,
        storage_settings: StorageSettings | None = None,
        audit_every: int = 1,
    ) -> None:
        self.shape = shape = shape or EngineShape()
        self.world = world or World()
        self.clock = ManualClock()
        self.wire = MemoryWire(self.clock)
        self.answers: dict[str, Answer] = {}
        self.prompts: dict[str, list[int]] = {}
        self.replies: dict[str, ToClient] = {}
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
        self._scope_domain = _fingerprint(shape).scope_domain()
        self._scopes_due: set[bytes] = set()  # counters that flushes of a store have named
        self.store: StorageBackend | None = None  # what `AttachStorage` attaches
        settings = storage_settings or StorageSettings(
            policy=shape.prefetch_policy, min_prefetch_tokens=shape.page_size
        )
        host = self._make_host() if shape.num_host_pages else None
        self.parts = self._wire_engine(host, settings)
        self._make_checks(audit_every)
        if backend is not None:
            self.attach(backend)

    # --- what a test does ---------------------------------------------------------------------------

    def attach(self, backend: StorageBackend) -> None:
        """Attach a store, whose calls are carried out when the loop looks at them."""
        self.parts.storage.attach_backend(self._stamped(backend))

    def send(self, message: ToEngine, *, client: bytes = CLIENT) -> None:
        """Give the engine a message for its next turn.

        A request under a rid that is in use, sent together with something that ends its bearer, is not sent: no
        client could tell whose outputs it gets.
        """
        if isinstance(message, Generate | GenerateBatch):
            items = message.items if isinstance(message, GenerateBatch) else (message,)
            items = tuple(item for item in items if not self._is_ambiguous(client, item.rid))
            if not items:
                return
            for item in items:
                self.answers.setdefault(item.rid, Answer())
                self.prompts.setdefault(item.rid, unpack_ids(item.prompt_ids).tolist())
                self.oracle.sent(client, item)
            message = GenerateBatch(items=items) if isinstance(message, GenerateBatch) else message
        self.wire.inbound.append((client, message))

    def _is_ambiguous(self, client: bytes, rid: str) -> bool:
        is_used = (client, rid) in self.oracle.active
        return is_used and any(_may_end(other, rid) for _, other in self.wire.inbound)

    def generate(
        self,
        rid: str,
        prompt: list[int],
        num_tokens: int = 8,
        *,
        logprobs: LogprobParams | None = None,
        output_interval: int = 1,
        **fields: Any,
    ) -> Answer:
        """Send a request; its answer fills as turns go by. `fields` are those of RequestOptions and SamplingParams."""
        options = {name: fields.pop(name) for name in RequestOptions.__struct_fields__ if name in fields}
        self.send(
            Generate(
                rid=rid,
                prompt_ids=pack_ids(prompt),
                sampling=SamplingParams(max_new_tokens=num_tokens, **fields),
                logprobs=logprobs,
                options=RequestOptions(**options),
                output_interval=output_interval,
            )
        )
        return self.answers[rid]

    def turn(self, count: int = 1) -> None:
        """Turn the loop, and check everything. Raises `Violation`."""
        for _ in range(count):
            self.world.turn += 1
            num_steps = self.runner.num_steps
            try:
                self.parts.loop.turn()
            except Violation:
                raise
            except AssertionError as error:
                raise Violation("engine_asserts", str(error)) from error
            except Exception as error:  # whatever it is, the loop would end here and the server with it
                raise Violation("engine_raises", f"{type(error).__name__}: {error}") from error
            self._check_survived()
            self._read()
            self.control.end_turn(has_launched=self.runner.num_steps > num_steps)
            self.promises.check(is_staging=self.control.is_staging, mirror=self._mirror)

    def _check_survived(self) -> None:
        """The loop goes on after an error of a step or a message: only those that were injected may be there."""
        survived = self.parts.loop.survived
        if not survived:
            return
        for error in survived:
            if isinstance(error, Violation):
                raise error
            if not isinstance(error, StepFault):
                promise = "engine_asserts" if isinstance(error, AssertionError) else "engine_raises"
                raise Violation(promise, f"{type(error).__name__}: {error}") from error
        survived.clear()

    def finish(self, *answers: Answer, max_turns: int = 2000) -> None:
        """Turn until all `answers` (or everything) ended. Raises `Violation` if they do not."""
        wanted = answers or tuple(self.answers.values())
        for _ in range(max_turns):
            if all(answer.finish for answer in wanted):
                return
            self.turn()
        raise Violation("progress", f"not finished after {max_turns} turns")

    def settle(self, *, max_turns: int = 100_000) -> None:
        """Turn until nothing is in flight."""
        self.turn(3)
        for _ in range(max_turns):
            if not self.parts.cache.lower.in_flight():
                return
            self.turn()
        raise Violation("progress", f"copies are in flight after {max_turns} turns")

    @property
    def is_waiting(self) -> bool:
        """Whether a call, a copy or a store is still to end, which requests may have to wait for."""
        is_copying = self.shape.num_host_pages > 0 and bool(self.copier.open_copies)
        return bool(self.calls.pending or self.jobs.open_jobs) or is_copying

    def check_all_pages_back(self) -> None:
        self.promises.check_drained()

    # --- putting it together ------------------------------------------------------------------------

    def _make_host(self) -> HostTier:
        shape = self.shape
        self.copier = FakeCopier(self.runner.kv, num_host_pages=shape.num_host_pages, seed=shape.seed)
        self.copier.max_polls = shape.max_copy_polls
        self.copier.failure_rate = shape.copy_failure_rate
        self.copier.step_pages = self._step_pages
        self.copier.turn = lambda: self.world.turn
        self.runner.wait_for_restores = self.copier.wait
        return HostTier(
            num_pages=shape.num_host_pages,
            copier=self.copier,
            pages=HostRecords(self.copier.host),
            policy=shape.write_policy,
            min_restore_tokens=shape.page_size,
        )

    def _wire_engine(self, host: HostTier | None, settings: StorageSettings) -> EngineParts:
        shape = self.shape
        self._limits = SchedulerLimits(
            max_running=shape.max_running,
            max_step_tokens=shape.max_step_tokens,
            prefill_chunk_tokens=shape.prefill_chunk_tokens,
            max_queued=shape.max_queued,
            max_context=shape.max_context,
        )
        return wire_engine(
            wire=self.wire,
            runner=self.runner,
            ready=_ready(shape),
            limits=self._limits,
            clock=self.clock,
            policy=shape.policy,
            is_cache_enabled=shape.is_cache_enabled,
            host=host,
            max_control_timeout_s=MAX_CONTROL_TIMEOUT_S,
            fingerprint=_fingerprint(shape),
            jobs=self.jobs,
            storage_settings=settings,
            storage_opener=self._open_store,
        )

    def _make_checks(self, audit_every: int) -> None:
        copier = self.copier if self.shape.num_host_pages else None
        self.oracle = Oracle(
            self.world,
            page_size=self.shape.page_size,
            vocab_size=VOCAB_SIZE,
            limits=self._limits,
            capacity_tokens=self.shape.num_pages * self.shape.page_size - 1,
            eos_token_ids=frozenset(self.shape.eos_token_ids),
            weights=self.runner.weights,
            running=lambda: self.parts.scheduler.running,
            pages_of=self.runner.pages_of,
        )
        self.runner.audit = self.oracle
        self.calls = Calls(self.clock, max_timeout_s=MAX_CONTROL_TIMEOUT_S)
        lower = self.parts.cache.lower
        retirements = Retirements(
            self.world,
            engine=self.oracle,
            device=self.runner.kv,
            copier=copier,
            prefetches=lambda: lower.storage.reader.prefetches if lower.storage else [],
        )

        def is_quiet() -> bool:
            cache = self.parts.cache
            return not (cache.leases or cache.lower.holds or self.runner.open_steps or self.parts.blockers())

        cuts = Cuts(
            self.parts.cache,
            retirements=retirements,
            calls=self.calls,
            held_pages=self._held_pages,
            is_quiet=is_quiet,
        )
        service = ServicePromises(
            self.parts.scheduler,
            oracle=self.oracle,
            max_queued=self.shape.max_queued,
            is_fcfs=self.shape.policy == "fcfs",
            advance=self.parts.control.advance,
            is_quiet=is_quiet,
        )
        self.parts.control.advance = service.checked_advance  # type: ignore[method-assign]
        self.control = ControlPromises(
            self.world,
            oracle=self.oracle,
            calls=self.calls,
            retirements=retirements,
            cuts=cuts,
            service=service,
            live_pins=lambda: {
                pin.pin_id: bool(pin.lease and pin.lease.retirements) for pin in self.parts.pinning.pins
            },
            weights=self.runner.weights,
            phases=lambda: {info.call_id: info.phase for info in self.parts.control.pending.infos()},
        )
        self.promises = Promises(
            self.world,
            self.parts,
            clock=self.clock,
            runner=self.runner,
            copier=copier,
            jobs=self.jobs,
            oracle=self.oracle,
            calls=self.calls,
            retirements=retirements,
            audit_every=audit_every,
        )
        self._mirror: EventMirror | None = None
        if self.shape.has_events:
            self._mirror = EventMirror(self.parts.cache.tree, StorageNames(_fingerprint(self.shape)))
            self.parts.cache.observe(self._mirror.recorder)
        self.wire.on_receive = self._on_receive

    # ------------------------------------------------------------------------------------------------

    def _on_receive(self, wait_s: float, messages: list[tuple[bytes, ToEngine]]) -> None:
        if not messages:
            self.calls.check_sleep(wait_s)
        for _, message in messages:
            if isinstance(message, FlushCache) and "storage" in message.tiers:
                named = scope_id(self._scope_domain, cache_salt=message.cache_salt, extra_key=message.extra_key)
                self._scopes_due.add(named)
        self.control.begin_turn(messages)

    def _open_store(self, kind: str, **options: Any) -> StorageBackend:
        if self.store is None:
            raise ValueError("there is no store to attach")
        return self._stamped(self.store)

    def _stamped(self, backend: StorageBackend) -> StampedBackend:
        return StampedBackend(backend, turn=lambda: self.world.turn, due=self._scopes_due)

    def _held_pages(self) -> set[int]:
        leases = [request.lease for request in self.parts.scheduler.running if request.lease is not None]
        return {page for lease in leases for page in lease.page_table().tolist()}

    def _step_pages(self) -> StepPages:
        steps = self.runner.open_steps
        return StepPages(
            {page for step in steps for pages in step.read for page in pages.tolist()},
            {page for step in steps for pages in step.written for page in pages.tolist()},
        )

    def _read(self) -> None:
        sent, self.wire.sent = self.wire.sent, []
        for client, message in sent:
            if isinstance(message, Outputs):
                for output in message.items:
                    self.oracle.told(client, output)
                    self.answers[output.rid].take(output)
            else:
                self.control.answered(self.calls.answered(client, message), message)
                self.replies[message.call_id] = message


def _ready(shape: EngineShape) -> EngineReady:
    return EngineReady(
        call_id="",
        model_name="fake",
        architecture="Fake",
        dtype="uint64",
        vocab_size=VOCAB_SIZE,
        max_context=shape.max_context,
        eos_token_ids=shape.eos_token_ids,
        page_size=shape.page_size,
        num_pages=shape.num_pages,
        page_bytes=8 * shape.page_size,
        max_running=shape.max_running,
        weights_id=shape.weights_id,
        weight_version="default",
        load_s=0.0,
        device="fake",
    )


def _fingerprint(shape: EngineShape) -> Fingerprint:
    return Fingerprint(
        weights_id="",  # names of pages take it from their namespace
        model_config_hash="fake",
        kv_dtype="uint64",
        page_size=shape.page_size,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
    )


def _may_end(message: ToEngine, rid: str) -> bool:
    """Whether the engine ends a request of this name as soon as it reads `message`."""
    match message:
        case Abort():
            return message.match == "all" or rid.startswith(message.rid)
        case SetWeightVersion():
            return message.abort_all_requests is not False
    return False
