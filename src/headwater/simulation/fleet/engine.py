"""One engine of a simulated fleet: the real loop on a fake model, which its owner turns."""

from dataclasses import dataclass

from headwater.cache.host_tier import HostTier, WritePolicy
from headwater.clock import Clock
from headwater.engine.wiring import wire_engine
from headwater.messages.state import EngineReady
from headwater.messages.wire import ToClient, ToEngine, decode_to_client, decode_to_engine, encode
from headwater.scheduling.limits import SchedulerLimits
from headwater.simulation.fakes.copier import FakeCopier
from headwater.simulation.fakes.jobs import FakeJobRunner
from headwater.simulation.fakes.kv_records import HostRecords
from headwater.simulation.fakes.memory import FakeWeights
from headwater.simulation.fakes.runner import FakeRunner
from headwater.storage.backend import StorageBackend
from headwater.storage.memory import MemoryBackend

CLIENT = b"api"
VOCAB_SIZE = 1000
NUM_PAGES, NUM_HOST_PAGES, PAGE_SIZE, MAX_RUNNING, MAX_CONTEXT = 64, 32, 4, 4, 200


@dataclass(frozen=True, slots=True)
class FleetState:
    """The state that clients give a server, and that each of its engines must have."""

    weights: str
    label: str
    is_paused: bool = False
    released: frozenset[str] = frozenset()
    store: str = ""
    adapters: frozenset[tuple[str, str]] = frozenset()  # name and content

    @property
    def is_serving(self) -> bool:
        """Whether requests run, without a pause and with all memory."""
        return not self.is_paused and not self.released


class FleetWire:
    """`engine.wire.Wire` in memory. It never sleeps, since the server moves the clock of the whole fleet."""

    def __init__(self) -> None:
        self.inbound: list[bytes] = []
        self.outbound: list[ToClient] = []

    def receive(self, *, wait_s: float) -> list[tuple[bytes, ToEngine]]:
        taken, self.inbound = self.inbound, []
        return [(CLIENT, decode_to_engine(frame)) for frame in taken]

    def send(self, client: bytes, message: ToClient) -> None:
        self.outbound.append(decode_to_client(encode(message)))

    def close(self) -> None:
        """There is nothing to close."""


class FleetEngine:
    """An engine whose next `turn` reads the messages of `send`; `take` returns its answers."""

    def __init__(self, clock: Clock, *, weights: FakeWeights | None = None, weight_version: str = "default") -> None:
        self.wire = FleetWire()
        self.runner = FakeRunner(
            num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_running=MAX_RUNNING, vocab_size=VOCAB_SIZE
        )
        if weights is not None:
            weights.is_in_use = self.runner.weights.is_in_use
            self.runner.weights = weights
        self.parts = wire_engine(
            wire=self.wire,
            runner=self.runner,
            ready=_ready(self.runner.weights.current, weight_version),
            limits=SchedulerLimits(
                max_running=MAX_RUNNING,
                max_step_tokens=64,
                prefill_chunk_tokens=32,
                max_queued=1000,
                max_context=MAX_CONTEXT,
            ),
            clock=clock,
            host=self._host(),
            jobs=FakeJobRunner(),
            storage_opener=_open_store,
        )

    @property
    def state(self) -> FleetState:
        """Its present state, read from its parts."""
        scheduler, control = self.parts.scheduler, self.parts.control
        return FleetState(
            weights=self.runner.weights.current,
            label=scheduler.weight_version,
            is_paused=control.is_paused,
            released=frozenset(control.released_memory),
            store=self.parts.storage.place_name,
            adapters=frozenset((it.name, it.content.adapter_id) for it in scheduler.adapters.by_name.values()),
        )

    def send(self, message: ToEngine) -> None:
        self.wire.inbound.append(encode(message))

    def turn(self) -> None:
        self.parts.loop.turn()

    def take(self) -> list[ToClient]:
        """The messages sent since the last call."""
        said, self.wire.outbound = self.wire.outbound, []
        return said

    def _host(self) -> HostTier:
        copier = FakeCopier(self.runner.kv, num_host_pages=NUM_HOST_PAGES)
        copier.turn = lambda: 1
        return HostTier(
            num_pages=NUM_HOST_PAGES,
            copier=copier,
            pages=HostRecords(copier.host),
            policy=WritePolicy.WRITE_THROUGH,
            min_restore_tokens=PAGE_SIZE,
        )


def _open_store(kind: str, *, directory: str | None, **options: object) -> StorageBackend:
    if directory is not None and directory.startswith("broken"):
        raise ValueError(f"{directory} cannot be opened")
    return MemoryBackend(capacity_bytes=1 << 20)


def _ready(weights_id: str, weight_version: str) -> EngineReady:
    return EngineReady(
        call_id="",
        model_name="fake",
        architecture="Fake",
        dtype="uint64",
        vocab_size=VOCAB_SIZE,
        max_context=MAX_CONTEXT,
        eos_token_ids=(),
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        page_bytes=8 * PAGE_SIZE,
        max_running=MAX_RUNNING,
        weights_id=weights_id,
        weight_version=weight_version,
        load_s=0.0,
        device="fake",
    )
