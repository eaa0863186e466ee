"""Flush, pause and pending operations, and the answers that every call may get: `Done`, `Failed`."""

from typing import Literal

from msgspec import field

from headwater.messages.base import Answer, Call, DeferredCall, Struct, TimedCall

FLUSHED = "Cache flushed."  # SGLang's words, which scripts look for


class FlushCache(TimedCall, tag="flush_cache"):
    """Retire cached KV; the contract is docs/design.md section 6. Answered by `FlushResult`."""

    mode: Literal["idle", "now", "drain"] = "idle"
    tiers: tuple[str, ...] = ()  # empty: device and host, whichever exist
    cache_salt: str | None = None  # None: all
    extra_key: str | None = None
    lora_name: str | None = None  # what the name means when the flush takes effect; "": the model without adapters
    prefix_ids: bytes | None = None
    hold: bool = False
    dry_run: bool = False

    @property
    def names_prefix_of_store(self) -> bool:
        """Always refused: a store's keys are hashes, which cannot be listed by prefix."""
        return self.prefix_ids is not None and "storage" in self.tiers

    @property
    def names_adapter_of_store(self) -> bool:
        """Always refused: the generations by which a store forgets are those of salts and keys."""
        return self.lora_name is not None and "storage" in self.tiers


class PauseGeneration(DeferredCall, tag="pause_generation"):
    """Stop generating. `abort` ends requests, `retract` queues them without KV, `in_place` freezes them."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class ContinueGeneration(Call, tag="continue_generation"):
    """End a pause. Answered by `Done`."""


class CancelOperation(Call, tag="cancel_operation"):
    """Cancel a pending operation by its id (`DELETE /control/operations/{id}`) or by the call that began it."""

    operation_id: str = ""
    started_by_call: str = ""


class GetOperations(Call, tag="get_operations"):
    """Answered by `OperationList`."""


class Done(Answer, tag="done"):
    """A call succeeded and has no result."""


class Failed(Answer, tag="failed"):
    """A call was refused. `status` is the HTTP status that fits, `param` the parameter at fault if one is."""

    status: int
    message: str
    param: str | None = None
    blockers: dict[str, int] = field(default_factory=dict)


class PagesAndBytes(Struct):
    pages: int
    bytes: int


class FlushResult(Answer, tag="flush_result"):
    """How a flush ended (docs/design.md section 6). `status` is the HTTP status of the outcome."""

    status: int
    success: bool
    message: str
    mode: str
    waited_s: float
    generation: int = 0
    drained: bool = True
    dry_run: bool = False
    freed: dict[str, PagesAndBytes] = field(default_factory=dict)  # by tier
    retired: dict[str, PagesAndBytes] = field(default_factory=dict)  # by tier: cut from the tree, still pinned
    side_caches: dict[str, int] = field(default_factory=dict)  # entries dropped of caches without KV, by name
    still_warm: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()  # tiers that have not acknowledged
    blockers: dict[str, int] = field(default_factory=dict)


class PauseResult(Answer, tag="pause_result"):
    paused: bool
    num_requests: int  # aborted, retracted or frozen


class OperationInfo(Struct):
    """A deferred operation as `GET /control/operations` lists it."""

    operation_id: str
    kind: str
    phase: str
    waited_s: float
    remaining_s: float
    blockers: dict[str, int]
    call_id: str = ""  # of the call that began it; the same on every engine the call went to


class OperationList(Answer, tag="operations"):
    items: tuple[OperationInfo, ...]
