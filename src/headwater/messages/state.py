"""Connecting to an engine, its state, and its shutdown."""

from msgspec import field

from headwater.messages.adapters import AdapterState
from headwater.messages.base import Answer, Call, Struct


class Hello(Call, tag="hello"):
    """A client announces itself; answered by `EngineReady`."""


class GetState(Call, tag="get_state"):
    """Ask for an `EngineState`: what /metrics, /v1/loads, /server_info and /control/blockers show."""


class Ping(Call, tag="ping"):
    """Answered by `Done` in the next turn: the loop is alive."""


class Shutdown(Call, tag="shutdown"):
    """End the engine process: running requests are aborted, then the loop returns."""


class TierState(Struct):
    """Pages of one tier by owner; free + tree + private + retired + transfer == capacity."""

    capacity: int
    free: int
    tree: int
    private: int
    retired: int
    transfer: int
    evictable: int
    page_bytes: int
    ready: int | None = None  # pages that copies reach while memory is still being pinned; None: all

    @property
    def num_ready(self) -> int:
        """Pages that copies reach."""
        return self.capacity if self.ready is None else self.ready


class Distribution(Struct):
    """A histogram since the engine started. `counts` are not cumulative, and one more than `bounds`: the rest."""

    name: str  # of the metric, without `headwater_`
    labels: dict[str, str]
    bounds: tuple[float, ...]  # upper ones, each included
    counts: tuple[int, ...]
    total: float  # sum of the observations


class EngineState(Answer, tag="engine_state"):
    """A snapshot of the engine, taken between two turns. Counters only grow while the engine lives."""

    num_running: int
    num_waiting: int
    num_retracted: int
    num_paused: int
    paused: bool
    blockers: dict[str, int]
    tiers: dict[str, TierState]
    generation: int
    weights_id: str
    weight_version: str
    page_size: int
    gen_throughput: float  # generated tokens per second over the last window
    uptime_s: float
    counters: dict[str, float]  # monotonic, by name: see docs/metrics.md
    max_running: int
    max_total_tokens: int
    memory_bytes: dict[str, int]  # weights, kv_cache, ...
    namespaces: int = 0
    num_pending_operations: int = 0
    num_waiting_tokens: int = 0
    is_behind: bool = False  # it has missed a change that the other engines made, and refuses requests
    num_decided: int = 0  # of those: committed changes of several engines that this one has not made yet
    released_memory: tuple[str, ...] = ()
    side_caches: dict[str, int] = field(default_factory=dict)  # entries of caches without KV, by name
    adapters: tuple[AdapterState, ...] = ()
    num_adapter_slots: int = 0  # 0: LoRA adapters are not served
    num_retired_adapters: int = 0  # contents that only requests which have begun still use
    flushes: dict[str, int] = field(default_factory=dict)  # `{mode}:{outcome}` -> flushes that ended so
    flush_blockers: dict[str, int] = field(default_factory=dict)  # flushes that expired while this was in flight
    distributions: tuple[Distribution, ...] = ()
    held_by: tuple[str, ...] = ()  # orders by which requests wait: pause, released memory, pending operations


CONTROL_S = 0.001  # from one step to the next, outside the step: loop, messages, scheduling


class ComputeFacts(Struct):
    """How an engine computes on a CPU, measured at its start."""

    instruction_set: str  # of the kernels; empty: there are none, and numpy computes
    kernels: str  # where the library comes from: shipped, compiled here; or what to do where there is none
    num_threads: int
    is_pinned: bool
    weight_formats: tuple[str, ...]  # of the matrices, by their bytes
    is_quantized_here: bool  # blocks that were made while the weights were loaded, not those of a file
    token_bytes: int  # weights that a step of one row reads
    read_gb_s: float  # the memory's rate for those weights; 0 if not measured
    decode_s: float  # a step of one row

    @property
    def tokens_per_s(self) -> float:
        """Expected for one stream through HTTP, early in its context."""
        return 1 / (self.decode_s + CONTROL_S)


class GpuKernels(Struct):
    """Which kernels compute on a GPU."""

    card: str
    prompt_attention: str  # of long prompts: `fa3`, or `triton`, our own
    faster: tuple[str, ...] = ()  # what would be faster there, and why it is not used


class EngineReady(Answer, tag="engine_ready"):
    """The engine has loaded its model and can run; sent to every client that connects with `Hello`."""

    model_name: str
    architecture: str
    dtype: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    num_pages: int
    page_bytes: int
    max_running: int
    weights_id: str
    weight_version: str
    load_s: float
    device: str
    gpus: tuple[int, ...] = ()  # of each rank, if they were chosen among several
    sampling_defaults: dict[str, float] = field(default_factory=dict)  # recommended by the model's files, unchecked
    compute: ComputeFacts | None = None  # None: not on a CPU
    gpu_kernels: GpuKernels | None = None  # None: not on a GPU
    hidden_size: int = 0  # of embeddings
    pooling: str = ""  # that the model's files name, perhaps one that is not supported; empty: none
    adapters: tuple[AdapterState, ...] = ()  # LoRA adapters of the command line
    num_adapter_slots: int = 0  # 0: LoRA adapters are not served
    embedding_dimensions: tuple[int, ...] | None = None  # that a Matryoshka model has; empty: any; None: it is none
