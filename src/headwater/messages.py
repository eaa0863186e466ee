"""Every struct that crosses the border between an API process and an engine process.

The API process sends `ToEngine`, the engine sends `ToClient`; both are closed unions of tagged msgspec
structs in msgpack. Nothing here is pickled, nothing carries a tensor. Token ids travel as packed int32
(`pack_ids`, `unpack_ids`), so that a prompt of 100,000 tokens costs a copy and not 100,000 objects.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


def pack_ids(token_ids: Iterable[int] | TokenIds) -> bytes:
    """Token ids as little-endian int32 bytes."""
    if not isinstance(token_ids, np.ndarray):
        token_ids = np.fromiter(token_ids, dtype="<i4")
    return token_ids.astype("<i4", copy=False).tobytes()


def unpack_ids(packed: bytes) -> TokenIds:
    """The inverse of `pack_ids`. int32[n], read-only."""
    return np.frombuffer(packed, dtype="<i4")


class Struct(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The base of all messages: immutable, fields by name, defaults left out on the wire."""


# --- generation ------------------------------------------------------------------------------------


class SamplingParams(Struct):
    """How tokens are chosen and when generation ends, as the engine needs it; ranges are checked by the API.

    Stop *strings* are not here: the engine knows no text. The client ends such a request with `Abort`.
    """

    max_new_tokens: int = 128  # 0: compute the prompt's KV only
    min_new_tokens: int = 0  # EOS and stop tokens are masked until then
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    min_p: float = 0.0
    frequency_penalty: float = 0.0  # over generated tokens, times their count
    presence_penalty: float = 0.0  # over generated tokens, once
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    logit_bias: dict[int, float] | None = None
    seed: int = 0  # 0 <= seed < 2**63, always set by the client (random when the user gave none)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class LogprobParams(Struct):
    """Which log-probabilities (natural log, of the raw logits' softmax) a request wants."""

    top: int = 0  # alternatives per position
    token_ids: tuple[int, ...] = ()  # these ids at every position, too
    prompt_start: int = -1  # first prompt position to report; -1: outputs only


class Generate(Struct, tag="generate"):
    """Run one request. Answered by `Outputs` entries, the last of which has `finish`."""

    rid: str
    prompt_ids: bytes  # int32[n], n >= 1, see pack_ids
    sampling: SamplingParams
    logprobs: LogprobParams | None = None
    cache_salt: str = ""
    extra_key: str = ""
    priority: int = 0  # higher runs first
    no_store: bool = False  # leave nothing in the cache
    output_interval: int = 1  # tokens in an output; the first token comes alone, the last output is what is left


class Abort(Struct, tag="abort"):
    """End requests. With `match="prefix"` every rid that begins with `rid`; `match="all"` ignores `rid`.

    Answered by `Done` (an unknown rid is not an error); each ended request also gets its last output.
    `finish` tells the client's own reason, for example a stop string it found.
    """

    call_id: str
    rid: str = ""
    match: Literal["exact", "prefix", "all"] = "exact"
    message: str = "aborted"


class Hello(Struct, tag="hello"):
    """A client announces itself; answered by `EngineReady`."""

    call_id: str


# --- control ---------------------------------------------------------------------------------------


class FlushCache(Struct, tag="flush_cache"):
    """Retire cached KV; the contract is docs/design.md section 6. Answered by `FlushResult`."""

    call_id: str
    timeout_s: float = 0.0
    mode: Literal["idle", "now", "drain"] = "idle"
    tiers: tuple[str, ...] = ()  # empty: device and host, whichever exist
    cache_salt: str | None = None  # None: all
    extra_key: str | None = None
    prefix_ids: bytes | None = None
    hold: bool = False
    dry_run: bool = False


class PauseGeneration(Struct, tag="pause_generation"):
    """Stop generating. `abort` ends requests, `retract` queues them without KV, `in_place` freezes them."""

    call_id: str
    mode: Literal["abort", "retract", "in_place"] = "abort"


class ContinueGeneration(Struct, tag="continue_generation"):
    call_id: str


class UpdateWeights(Struct, tag="update_weights"):
    """Load new weights from a folder or file and swap them in, all or nothing. Answered by `WeightsUpdated`.

    Requests that run go on with the new weights unless `abort_all_requests`; what they hold is not published.
    """

    call_id: str
    path: str
    load_format: str = "auto"
    weight_version: str | None = None  # None: the label stays
    abort_all_requests: bool = False
    timeout_s: float = 600.0


class SetWeightVersion(Struct, tag="set_weight_version"):
    """Change the client's label for the weights; the cache is not touched. Answered by `Done`."""

    call_id: str
    weight_version: str
    abort_all_requests: bool = False


class GetWeights(Struct, tag="get_weights"):
    """The first values of a parameter, by its Hugging Face name. Answered by `Weights` or `Failed` (404)."""

    call_id: str
    name: str
    num_values: int = 100


class ReleaseMemory(Struct, tag="release_memory"):
    """Give memory back: any of `kv_cache`, `weights`. Waits up to `timeout_s` until nothing runs.

    New requests are queued meanwhile and until `ResumeMemory`. Answered by `MemoryResult`, or `Failed` with
    the blockers. Releasing what is released is harmless.
    """

    call_id: str
    tags: tuple[str, ...] = ()  # empty: all
    timeout_s: float = 0.0


class ResumeMemory(Struct, tag="resume_memory"):
    """Take released memory again; weights are read from their files. Answered by `MemoryResult`."""

    call_id: str
    tags: tuple[str, ...] = ()  # empty: all that is released
    timeout_s: float = 600.0


class AttachStorage(Struct, tag="attach_storage"):
    """Attach a store below the host tier, or replace the one attached, under traffic. Answered by `StorageInfo`.

    If it is the one attached and a policy is given, the store stays and the policies change.
    """

    call_id: str
    kind: Literal["file", "redis", "memory"]
    directory: str | None = None
    url: str | None = None
    size_bytes: int | None = None
    prefetch_policy: Literal["best_effort", "wait_complete", "timeout"] | None = None  # None: as it is
    write_policy: Literal["write_through", "write_through_selective", "write_back"] | None = None  # None: as it is
    timeout_s: float = 30.0


class DetachStorage(Struct, tag="detach_storage"):
    """Stop using the store; its pages stay in it. Answered by `StorageInfo`; without a store that is harmless."""

    call_id: str


class GetStorage(Struct, tag="get_storage"):
    """Answered by `StorageInfo`."""

    call_id: str


class PinPrefix(Struct, tag="pin_prefix"):
    """Keep a prefix from being evicted for `ttl_s` seconds. Answered by `Pins` with the new pin, or `Failed`.

    Only what the device has is pinned (`num_tokens` says how much). With `host` in `tiers` it is copied there, and
    held there as it arrives. A flush in scope ends a pin.
    """

    call_id: str
    prompt_ids: bytes
    ttl_s: float
    cache_salt: str = ""
    extra_key: str = ""
    tiers: tuple[Literal["device", "host"], ...] = ("device",)


class UnpinPrefix(Struct, tag="unpin_prefix"):
    """End a pin before its time. Answered by `Done`, or `Failed` (404)."""

    call_id: str
    pin_id: str


class GetPins(Struct, tag="get_pins"):
    """Answered by `Pins`."""

    call_id: str


class GetCacheTree(Struct, tag="get_cache_tree"):
    """The prefix tree down to `depth` nodes, the most used children first. Answered by `CacheTree`."""

    call_id: str
    depth: int = 3
    max_nodes: int = 1000


class CancelOperation(Struct, tag="cancel_operation"):
    """Cancel a pending operation by its id (`DELETE /control/operations/{id}`) or by the call that began it."""

    call_id: str
    operation_id: str = ""
    started_by_call: str = ""


class GetOperations(Struct, tag="get_operations"):
    call_id: str


class GetState(Struct, tag="get_state"):
    """Ask for an `EngineState`: what /metrics, /v1/loads, /server_info and /control/blockers show."""

    call_id: str


class Ping(Struct, tag="ping"):
    """Answered by `Done` in the next turn: the loop is alive."""

    call_id: str


class Shutdown(Struct, tag="shutdown"):
    """End the engine process: running requests are aborted, then the loop returns."""

    call_id: str


ToEngine = (
    Hello
    | Generate
    | Abort
    | FlushCache
    | PauseGeneration
    | ContinueGeneration
    | UpdateWeights
    | SetWeightVersion
    | GetWeights
    | ReleaseMemory
    | ResumeMemory
    | AttachStorage
    | DetachStorage
    | GetStorage
    | PinPrefix
    | UnpinPrefix
    | GetPins
    | GetCacheTree
    | CancelOperation
    | GetOperations
    | GetState
    | Ping
    | Shutdown
)


# --- answers ---------------------------------------------------------------------------------------


class TokenLogprob(Struct, array_like=True):
    """Log-probability of one token at one position, with the alternatives asked for."""

    token_id: int
    logprob: float | None  # None: the first prompt token, which nothing predicts
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    ids_logprobs: tuple[float, ...] = ()  # in the order of LogprobParams.token_ids


class Finish(Struct):
    """Why a request ended. `matched` is the stop token; `status` is an HTTP status, for `abort` only."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    message: str = ""
    status: int = 0
    err_type: str = ""


class OutputMeta(Struct):
    """Facts of a request beside its tokens; sent with its first and with its last output."""

    prompt_tokens: int
    cached_device: int = 0  # prompt tokens found on each tier
    cached_host: int = 0
    cached_storage: int = 0
    num_retractions: int = 0
    cache_generation: int = 0
    weight_version: str = ""
    weights_versions: tuple[tuple[str, int], ...] = ()  # (label, first output position), if more than one
    queue_time_s: float = 0.0


class Output(Struct, array_like=True):
    """What one step brought one request."""

    rid: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # once, with the first token
    finish: Finish | None = None
    meta: OutputMeta | None = None


class Outputs(Struct, tag="outputs"):
    """All outputs of one turn for one client: one message per step."""

    items: tuple[Output, ...]


class Done(Struct, tag="done"):
    """A call succeeded and has nothing else to say."""

    call_id: str


class Failed(Struct, tag="failed"):
    """A call was refused. `status` is the HTTP status that fits, `param` the parameter at fault if one is."""

    call_id: str
    status: int
    message: str
    param: str | None = None
    blockers: dict[str, int] = {}


class PagesAndBytes(Struct):
    pages: int
    bytes: int


class FlushResult(Struct, tag="flush_result"):
    """How a flush ended (docs/design.md section 6). `status` is the HTTP status of the outcome."""

    call_id: str
    status: int
    success: bool
    message: str
    mode: str
    waited_s: float
    generation: int = 0
    drained: bool = True
    dry_run: bool = False
    freed: dict[str, PagesAndBytes] = {}  # by tier
    retired: dict[str, PagesAndBytes] = {}  # by tier: cut from the tree, still pinned
    still_warm: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()  # tiers that have not acknowledged
    blockers: dict[str, int] = {}


class PauseResult(Struct, tag="pause_result"):
    call_id: str
    paused: bool
    num_requests: int  # aborted, retracted or frozen


class WeightsUpdated(Struct, tag="weights_updated"):
    """New weights are in place; no request can match KV of the old ones any more."""

    call_id: str
    message: str
    weights_id: str
    weight_version: str
    generation: int
    num_tensors: int
    num_kept: int  # requests that ran on across the update
    num_aborted: int
    waited_s: float
    freed: dict[str, PagesAndBytes] = {}
    retired: dict[str, PagesAndBytes] = {}


class Weights(Struct, tag="weights"):
    call_id: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[float, ...]  # the first ones, row by row


class MemoryResult(Struct, tag="memory_result"):
    call_id: str
    released: tuple[str, ...]  # what is released now
    num_bytes: int  # released or taken again by this call
    waited_s: float


class StorageInfo(Struct, tag="storage_info"):
    """The attached store; `kind` is empty when there is none."""

    call_id: str
    kind: str = ""
    prefetch_policy: str = ""
    write_policy: str = ""  # from the device to the host: empty without a host tier
    breaker: str = ""  # closed, open, half_open
    num_pages: int = 0
    num_bytes: int = 0
    capacity_bytes: int | None = None
    in_flight: dict[str, int] = {}
    counters: dict[str, int] = {}  # of the store and of the breaker
    num_given_up: int = 0  # copies that a detach or replacement gave up
    message: str = ""


class PinInfo(Struct):
    pin_id: str
    num_tokens: int
    remaining_s: float
    cache_salt: str = ""
    extra_key: str = ""
    tiers: tuple[str, ...] = ("device",)
    num_host_tokens: int = 0  # held on the host by now; grows to num_tokens if `host` was asked for


class Pins(Struct, tag="pins"):
    call_id: str
    items: tuple[PinInfo, ...]


class TreeNode(Struct):
    """A node of the prefix tree: a run of pages, how often it was hit, and where it lies."""

    num_tokens: int
    first_ids: tuple[int, ...]  # the first few token ids
    tiers: dict[str, int]  # tier -> pins on its run there
    num_hits: int
    children: tuple["TreeNode", ...] = ()
    num_children: int = 0  # also those left out


class TreeRoot(Struct):
    cache_salt: str
    extra_key: str
    weights_id: str
    num_tokens: int  # in all nodes
    num_nodes: int
    children: tuple[TreeNode, ...]


class CacheTree(Struct, tag="cache_tree"):
    call_id: str
    roots: tuple[TreeRoot, ...]
    generation: int
    is_cut: bool  # nodes were left out


class OperationInfo(Struct):
    """A deferred operation as `GET /control/operations` lists it."""

    operation_id: str
    kind: str
    phase: str
    waited_s: float
    remaining_s: float
    blockers: dict[str, int]
    call_id: str = ""  # of the call that began it; the same on every engine the call went to


class Operations(Struct, tag="operations"):
    call_id: str
    items: tuple[OperationInfo, ...]


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


class EngineState(Struct, tag="engine_state"):
    """A snapshot of the engine, taken between two turns. Counters only grow while the engine lives."""

    call_id: str
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
    released_memory: tuple[str, ...] = ()


class EngineReady(Struct, tag="engine_ready"):
    """The engine has loaded its model and can run; sent to every client that connects with `Hello`."""

    call_id: str
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


ToClient = (
    Outputs
    | Done
    | Failed
    | FlushResult
    | PauseResult
    | WeightsUpdated
    | Weights
    | MemoryResult
    | StorageInfo
    | Pins
    | CacheTree
    | Operations
    | EngineState
    | EngineReady
)

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_client = msgspec.msgpack.Decoder(ToClient).decode
