"""The real loop, scheduler, cache and control plane around the fake runner, a turn at a time."""

from dataclasses import dataclass, field

from headwater.cache.invariants import check_invariants
from headwater.cache.namespace import Tier
from headwater.cache.prefix_cache import HostTier
from headwater.cache.storage_names import StorageNames
from headwater.cache.storage_tier import StorageSettings, StorageTier
from headwater.cache.write_policy import WritePolicy
from headwater.clock import ManualClock
from headwater.engine.wiring import wire_engine
from headwater.messages import (
    EngineReady,
    Finish,
    Generate,
    LogprobParams,
    OutputMeta,
    Outputs,
    SamplingParams,
    ToClient,
    ToEngine,
    TokenLogprob,
    pack_ids,
)
from headwater.scheduling.scheduler import Limits
from headwater.simulation.canary import expected_tokens
from headwater.simulation.fake_copier import FakeCopier, FakeHostPages
from headwater.simulation.fake_jobs import FakeJobRunner
from headwater.simulation.fake_runner import FakeRunner
from headwater.storage.backend import StorageBackend
from headwater.storage.page_key import Fingerprint

VOCAB_SIZE = 1000
CLIENT = b"client"


class MemoryWire:
    """`engine.wire.Wire` in memory."""

    def __init__(self, clock: ManualClock) -> None:
        self.inbound: list[tuple[bytes, ToEngine]] = []
        self.sent: list[tuple[bytes, ToClient]] = []
        self.last_wait_s = 0.0
        self._clock = clock

    def receive(self, *, wait_s: float) -> list[tuple[bytes, ToEngine]]:
        self.last_wait_s = wait_s
        if not self.inbound:
            self._clock.advance(wait_s)  # a loop that would sleep sleeps in virtual time
        taken, self.inbound = self.inbound, []
        return taken

    def send(self, client: bytes, message: ToClient) -> None:
        self.sent.append((client, message))

    def close(self) -> None:
        """Nothing to let go of."""


@dataclass
class Answer:
    """What a request has said so far."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    meta: OutputMeta | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class Driver:
    """An engine in the hands of a test. Checks the books after every turn."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        max_running: int = 8,
        max_step_tokens: int = 64,
        prefill_chunk_tokens: int = 32,
        max_queued: int = 1000,
        max_context: int = 4096,
        is_async: bool = False,
        policy: str = "fcfs",
        eos_token_ids: tuple[int, ...] = (),
        is_cache_enabled: bool = True,
        num_host_pages: int = 0,
        write_policy: WritePolicy = WritePolicy.WRITE_THROUGH,
        max_copy_polls: int = 0,
        copy_failure_rate: float = 0.0,
        backend: StorageBackend | None = None,
        storage_settings: StorageSettings | None = None,
        weights_id: str = "w0",
    ) -> None:
        self.clock = ManualClock()
        self.wire = MemoryWire(self.clock)
        self.runner = FakeRunner(
            num_pages=num_pages,
            page_size=page_size,
            max_running=max_running,
            vocab_size=VOCAB_SIZE,
            is_async=is_async,
        )
        host = None
        if num_host_pages:
            self.copier = FakeCopier(self.runner.kv, num_host_pages=num_host_pages)
            self.copier.max_polls = max_copy_polls
            self.copier.failure_rate = copy_failure_rate
            host = HostTier(
                num_pages=num_host_pages,
                copier=self.copier,
                pages=FakeHostPages(self.copier.host),
                policy=write_policy,
                min_restore_tokens=page_size,
            )
        ready = EngineReady(
            call_id="",
            model_name="fake",
            architecture="Fake",
            dtype="uint64",
            vocab_size=VOCAB_SIZE,
            max_context=max_context,
            eos_token_ids=eos_token_ids,
            page_size=page_size,
            num_pages=num_pages,
            page_bytes=page_size * 8,
            max_running=max_running,
            weights_id=weights_id,
            weight_version="default",
            load_s=0.0,
            device="fake",
        )
        self.parts = wire_engine(
            wire=self.wire,
            runner=self.runner,
            ready=ready,
            limits=Limits(
                max_running=max_running,
                max_step_tokens=max_step_tokens,
                prefill_chunk_tokens=prefill_chunk_tokens,
                max_queued=max_queued,
                max_context=max_context,
            ),
            clock=self.clock,
            policy=policy,  # type: ignore[arg-type]
            is_cache_enabled=is_cache_enabled,
            host=host,
        )
        self.runner.weights.current = weights_id
        self.jobs = FakeJobRunner()
        if backend is not None:
            self.attach(backend, storage_settings)
        self.answers: dict[str, Answer] = {}
        self.replies: dict[str, ToClient] = {}

    def attach(self, backend: StorageBackend, settings: StorageSettings | None = None) -> None:
        """Attach a store, whose calls are carried out when the loop looks at them."""
        cache = self.parts.cache
        assert cache.host is not None and cache.transfers is not None
        fingerprint = Fingerprint(
            weights_id="",
            model_config_hash="fake",
            kv_dtype="uint64",
            page_size=cache.page_size,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
        )
        cache.attach_storage(
            StorageTier(
                backend,
                tree=cache.tree,
                host=cache.books[Tier.HOST],
                host_pages=cache.host.pages,
                names=StorageNames(fingerprint),
                jobs=self.jobs,
                clock=self.clock,
                settings=settings or StorageSettings(min_prefetch_tokens=cache.page_size),
                counters=cache.transfers.counters,
            )
        )

    def send(self, message: ToEngine, *, client: bytes = CLIENT) -> None:
        if isinstance(message, Generate):
            self.answers.setdefault(message.rid, Answer())
        self.wire.inbound.append((client, message))

    def generate(
        self,
        rid: str,
        prompt: list[int],
        num_tokens: int = 8,
        *,
        logprobs: LogprobParams | None = None,
        cache_salt: str = "",
        extra_key: str = "",
        priority: int = 0,
        no_store: bool = False,
        **sampling: object,
    ) -> Answer:
        """Send a request; its answer fills as turns go by."""
        self.send(
            Generate(
                rid=rid,
                prompt_ids=pack_ids(prompt),
                sampling=SamplingParams(max_new_tokens=num_tokens, **sampling),  # type: ignore[arg-type]
                logprobs=logprobs,
                cache_salt=cache_salt,
                extra_key=extra_key,
                priority=priority,
                no_store=no_store,
            )
        )
        return self.answers[rid]

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.parts.loop.turn()
            check_invariants(self.parts.cache)
            self._read()

    def finish(self, *answers: Answer, max_turns: int = 2000) -> None:
        """Turn until all `answers` (or everything) ended."""
        wanted = answers or tuple(self.answers.values())
        for _ in range(max_turns):
            if all(answer.finish for answer in wanted):
                return
            self.turn()
        raise AssertionError(f"not finished after {max_turns} turns")

    def settle(self) -> None:
        """Turn until nothing is in flight."""
        self.turn(3)
        while self.parts.cache.in_flight():
            self.turn()

    def check_all_pages_back(self) -> None:
        cache = self.parts.cache
        assert not cache.leases
        assert cache.num_available == cache.pool.capacity

    def _read(self) -> None:
        for _, message in self.wire.sent:
            if isinstance(message, Outputs):
                for output in message.items:
                    self._take(output)
            else:
                call_id = message.call_id
                assert call_id not in self.replies, f"call {call_id} was answered twice"
                self.replies[call_id] = message
        self.wire.sent = []

    def _take(self, output) -> None:
        answer = self.answers[output.rid]
        assert answer.finish is None, f"{output.rid} spoke after its end"
        answer.tokens += output.token_ids
        answer.logprobs += output.logprobs or ()
        answer.prompt_logprobs += output.prompt_logprobs or ()
        answer.finish = output.finish
        answer.meta = output.meta or answer.meta


def expected(prompt: list[int], num_tokens: int, weights: list[str] | str = "w0") -> list[int]:
    """The oracle's text; `weights` names those that computed each position."""
    return expected_tokens(prompt, num_tokens, VOCAB_SIZE, weights)
