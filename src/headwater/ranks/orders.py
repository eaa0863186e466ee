"""Commands of the plan stream that are rare, and what rank processes answer: tagged structs in msgpack."""

import msgspec

from headwater.messages.base import Struct


class BuildRunner(Struct, tag="build_runner"):
    """Allocate the KV memory and record the model; answered by `Ready`. Comes once, before every other command."""

    num_pages: int
    max_context: int
    num_host_pages: int  # 0: no host tier
    weights_bytes: int  # of rank 0's share: what follows from it, as the sizes of CUDA graphs, is equal on all ranks


class CaptureGraphs(Struct, tag="capture_graphs"):
    """Capture the CUDA graphs, if there are any: all ranks do, in the same order."""


class StageWeights(Struct, tag="stage"):
    """Begin to read new weights; answered by `Staged` when they have been checked."""

    staging_id: int
    path: str
    load_format: str


class StageReceived(Struct, tag="stage_received"):
    """Begin to read tensors that a trainer sent; answered by `Staged` when they have been checked."""

    staging_id: int
    path: str
    weights_id: str


class ReloadWeights(Struct, tag="reload"):
    """Begin to read the released weights again; answered by `Staged`."""

    staging_id: int
    accepts_changes: bool


class AbandonWeights(Struct, tag="abandon"):
    staging_id: int


class SwapWeights(Struct, tag="swap"):
    """The next step computes with the staged weights."""

    staging_id: int


class StageAdapter(Struct, tag="stage_adapter"):
    """Begin to read a LoRA adapter; answered by `AdapterStaged` when its share has been converted."""

    staging_id: int
    path: str


class AbandonAdapter(Struct, tag="abandon_adapter"):
    staging_id: int


class PlaceAdapter(Struct, tag="place_adapter"):
    """Steps that follow may have rows with the staged adapter, in this slot."""

    staging_id: int
    slot: int


class ClearAdapter(Struct, tag="clear_adapter"):
    slot: int


class ReadWeights(Struct, tag="read_weights"):
    """Answered by `WeightsRead`."""

    read_id: int
    name: str
    num_values: int


class HashWeights(Struct, tag="hash_weights"):
    """Begin to hash the weights in place; answered by `WeightsHashed`. `AbandonWeights` gives it up."""

    staging_id: int


class ReleaseWeights(Struct, tag="release_weights"):
    pass


class ReleaseKv(Struct, tag="release_kv"):
    pass


class ResumeKv(Struct, tag="resume_kv"):
    pass


class Recover(Struct, tag="recover"):
    """A step has failed: leave it, and meet the other ranks anew. Answered by `Recovered`."""

    recovery_id: int


class Stop(Struct, tag="stop"):
    """End the process."""


Order = (
    BuildRunner
    | CaptureGraphs
    | StageWeights
    | StageReceived
    | ReloadWeights
    | AbandonWeights
    | SwapWeights
    | StageAdapter
    | AbandonAdapter
    | PlaceAdapter
    | ClearAdapter
    | ReadWeights
    | HashWeights
    | ReleaseWeights
    | ReleaseKv
    | ResumeKv
    | Recover
    | Stop
)


class Loaded(Struct, tag="loaded"):
    """The rank has its share of the weights."""

    weights_id: str
    weights_bytes: int
    num_pages: int | None = None  # that fit in its memory, if that is its own


class Ready(Struct, tag="ready"):
    """The rank can compute."""


class Refused(Struct, tag="refused"):
    """The rank cannot start, by a mistake of the user: the process ends."""

    message: str


class Copied(Struct, tag="copied"):
    """A copy of pages has ended on this rank."""

    copy_id: int
    has_failed: bool
    took_s: float


class Near(Struct, tag="near"):
    """So little of a restore is to come on this rank that steps may read its pages."""

    copy_id: int
    is_alone: bool  # steps of a request that runs alone
    has_failed: bool = False  # it never will be


class Staged(Struct, tag="staged"):
    """New weights have been read and checked, or refused."""

    staging_id: int
    error: str | None = None
    weights_id: str = ""  # as it will be after the swap; only without error
    has_changed: bool = False


class AdapterStaged(Struct, tag="adapter_staged"):
    """A LoRA adapter has been read and checked, or refused."""

    staging_id: int
    error: str | None = None
    adapter_id: str = ""  # only without error


class WeightsRead(Struct, tag="weights_read"):
    """What the rank holds of a parameter's first values, float32."""

    read_id: int
    shape: tuple[int, ...] = ()
    values: bytes = b""
    error: str | None = None


class Recovered(Struct, tag="recovered"):
    recovery_id: int


class WeightsHashed(Struct, tag="weights_hashed"):
    """What the rank holds of each tensor, or why that is not known."""

    staging_id: int
    error: str | None
    hashes: dict[str, str]


class StepFailed(Struct, tag="step_failed"):
    """A step raised on this rank."""

    step_id: int
    error: str


class CommandFailed(Struct, tag="command_failed"):
    """Another command raised: the rank no longer has the state of the others."""

    error: str


Report = (
    Loaded
    | Ready
    | Refused
    | Copied
    | Near
    | Staged
    | AdapterStaged
    | WeightsRead
    | WeightsHashed
    | Recovered
    | StepFailed
    | CommandFailed
)

encode_order = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
