"""One engine of a planned fleet: the real loop, scheduler and cache with a virtual clock."""

import math
from dataclasses import dataclass

from headwater.cache.host_tier import HostTier, WritePolicy
from headwater.cache.storage.tier import PrefetchPolicy, StorageSettings
from headwater.clock import ManualClock
from headwater.engine.wiring import wire_engine
from headwater.messages.generation import Output, Outputs
from headwater.messages.state import EngineReady
from headwater.messages.wire import ToClient, ToEngine
from headwater.planning.cost_model import CostModel, check_ranks
from headwater.planning.hardware import Hardware
from headwater.planning.model_shape import ModelShape
from headwater.planning.timed_runner import TimedRunner
from headwater.planning.timed_tiers import Link, MeteredStore, StandInPages, TimedCopier, TimedJobs
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.waiting_queue import SchedulePolicy
from headwater.storage.page_key import Fingerprint

_CLIENT = b"planner"


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The setup of each engine. Sizes are in bytes; a tier of size 0 is absent."""

    model: ModelShape
    hardware: Hardware
    tp_size: int = 1  # devices of an engine, each with a share of the model
    device_bytes: float | None = None  # for KV, of all ranks; None: 90 % of their memory, minus the weights
    host_bytes: float = 0.0
    storage_bytes: float = 0.0  # of the store, which all engines share
    page_size: int = 16
    max_running: int = 256
    prefill_chunk_tokens: int = 2048
    max_step_tokens: int | None = None  # None: one chunk plus one token per request
    max_gap_s: float | None = None  # that prefill leaves between two tokens of a stream
    max_queued: int = 1_000_000
    policy: SchedulePolicy = "fcfs"
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.TIMEOUT

    def __post_init__(self) -> None:
        check_ranks(self.model, self.hardware, self.tp_size)
        for name in ("page_size", "max_running", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("host_bytes", "storage_bytes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
        if self.storage_bytes and self.num_host_pages < 1:
            raise ValueError("storage needs a host tier: give it host memory")
        if self.num_device_pages < 2:
            raise ValueError(
                f"the KV cache of {self.model.name} on {self.hardware.name} has room for {self.num_device_pages} "
                f"pages of {self.page_bytes / 2**20:.2f} MiB: at least 2 are needed"
            )

    @property
    def page_bytes(self) -> float:
        return self.model.kv_bytes_per_token * self.page_size

    @property
    def rank_page_bytes(self) -> float:
        """Of a page, the bytes that each rank holds and copies."""
        return self.model.rank_kv_bytes_per_token(self.tp_size) * self.page_size

    @property
    def num_device_pages(self) -> int:
        num_bytes = self.device_bytes
        if num_bytes is None:
            num_bytes = 0.9 * self.hardware.memory_bytes * self.tp_size - self.model.total_weight_bytes
        return max(0, int(num_bytes / self.tp_size / self.rank_page_bytes))

    @property
    def num_host_pages(self) -> int:
        return int(self.host_bytes / self.page_bytes)

    @property
    def num_storage_pages(self) -> int:
        return int(self.storage_bytes / self.page_bytes)


class PlannedEngine:
    """An engine that takes messages and turns on its own clock. `wake_s` limits its sleep."""

    def __init__(self, index: int, plan: EnginePlan, store: MeteredStore | None) -> None:
        self.index = index
        self.clock = ManualClock()
        self.wake_s = math.inf
        self.runner = TimedRunner(
            CostModel(plan.model, plan.hardware, tp_size=plan.tp_size),
            clock=self.clock,
            max_running=plan.max_running,
            is_async=plan.hardware.is_async,
        )
        self._inbound: list[tuple[bytes, ToEngine]] = []
        self._outputs: list[Output] = []
        limits = SchedulerLimits(
            max_running=plan.max_running,
            max_step_tokens=plan.max_step_tokens or plan.prefill_chunk_tokens + plan.max_running,
            prefill_chunk_tokens=plan.prefill_chunk_tokens,
            max_queued=plan.max_queued,
            max_context=plan.model.max_context,
            max_gap_s=plan.max_gap_s,
        )
        self.parts = wire_engine(
            wire=self,
            runner=self.runner,
            ready=_ready(plan),
            limits=limits,
            clock=self.clock,
            policy=plan.policy,
            host=self._host(plan),
            fingerprint=_fingerprint(plan),
            jobs=self._jobs(plan, store) if store is not None else None,
            storage_settings=StorageSettings(policy=plan.prefetch_policy),
        )
        if store is not None:
            self.parts.storage.attach_backend(store)

    @property
    def is_busy(self) -> bool:
        """Whether a turn would change anything before the next message."""
        return bool(self._inbound or self.parts.blockers() or self.parts.scheduler.running)

    def deliver(self, message: ToEngine, *, now_s: float) -> None:
        """Send a message at `now_s`, which wakes a sleeping engine."""
        if not self.is_busy:
            self.clock.advance(max(0.0, now_s - self.clock.now()))
        self._inbound.append((_CLIENT, message))

    def turn(self) -> list[Output]:
        """Turn the loop once; return its outputs, whose time is the clock's present time."""
        self.parts.loop.turn()
        outputs, self._outputs = self._outputs, []
        return outputs

    # --- engine.wire.Wire ---------------------------------------------------------------------------

    def receive(self, *, wait_s: float) -> list[tuple[bytes, ToEngine]]:
        taken, self._inbound = self._inbound, []
        if not taken:
            self.clock.advance(max(0.0, min(wait_s, self.wake_s - self.clock.now())))
        return taken

    def send(self, client: bytes, message: ToClient) -> None:
        if isinstance(message, Outputs):
            self._outputs += message.items

    def close(self) -> None:
        """There is nothing to close."""

    # ------------------------------------------------------------------------------------------------

    def _host(self, plan: EnginePlan) -> HostTier | None:
        if plan.num_host_pages < 1:
            return None
        copier = TimedCopier(self.clock, page_bytes=plan.rank_page_bytes, bytes_per_s=plan.hardware.host_bytes_per_s)
        return HostTier(num_pages=plan.num_host_pages, copier=copier, pages=StandInPages(), policy=plan.write_policy)

    def _jobs(self, plan: EnginePlan, store: MeteredStore) -> TimedJobs:
        hardware = plan.hardware
        link = Link(self.clock, bytes_per_s=hardware.storage_bytes_per_s, latency_s=hardware.storage_latency_s)
        return TimedJobs(store, link, clock=self.clock, page_bytes=plan.page_bytes)


def _ready(plan: EnginePlan) -> EngineReady:
    return EngineReady(
        call_id="",
        model_name=plan.model.name,
        architecture="",
        dtype="",
        vocab_size=plan.model.vocab_size,
        max_context=plan.model.max_context,
        eos_token_ids=(),
        page_size=plan.page_size,
        num_pages=plan.num_device_pages,
        page_bytes=int(plan.page_bytes),
        max_running=plan.max_running,
        weights_id="planned",
        weight_version="",
        load_s=0.0,
        device=plan.hardware.name,
    )


def _fingerprint(plan: EnginePlan) -> Fingerprint:
    return Fingerprint(
        weights_id="",
        model_config_hash=plan.model.name,
        kv_dtype="",
        page_size=plan.page_size,
        num_layers=plan.model.num_layers,
        num_kv_heads=plan.model.num_kv_heads,
        head_dim=plan.model.head_dim,
    )
