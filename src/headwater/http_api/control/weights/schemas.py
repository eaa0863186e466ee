"""Bodies of the routes for weights that a trainer sends: SGLang's names and ours."""

from typing import Any, Literal

from pydantic import Field

from headwater.generation.body import Body
from headwater.generation.validation import Name, Text
from headwater.http_api.control.schemas_control import Seconds

GROUP = "weight_update_group"  # SGLang's default
_LABEL = Field(default=None, description="New label; left out: the label stays.")
_TRANSFER = Field(default=None, description="The bracket that the call belongs to. Left out: the one that is open.")
_ABORT = Field(default=False, description="Abort running requests at the swap; otherwise they continue.")
_IN_PLACE = Field(
    default=False,
    description="Overwrite the weights layer by layer while nothing runs, where memory holds no two copies.",
)
_SELECTOR: Any = Field(default="all", description="`all` or `target`: there is one model.")
_FLUSH = Field(default=True, description="Ignored: requests never match KV of other weights.")
_IGNORED = Field(default=False, description="Ignored.")


class Push(Body):
    """What every call with tensors may say."""

    weight_version: Name | None = _LABEL
    abort_all_requests: bool = _ABORT
    transfer_id: Name | None = _TRANSFER
    in_place: bool = _IN_PLACE
    timeout: Seconds = None


class WeightsFromTensor(Push):
    """Tensors of this host: a file in shared memory, or SGLang's pickles."""

    safetensors_path: Text | None = Field(
        default=None, description="A .safetensors file in /dev/shm. The server copies it before it answers."
    )
    take: bool = Field(
        default=False,
        description="Move the file of `safetensors_path` instead of copying it: it is the server's from then on.",
    )
    serialized_named_tensors: list[Text] | None = Field(
        default=None,
        description="SGLang's form: base64 pickles, one for each rank of the engine. The first one is read. "
        "Needs --allow-pickled-tensors.",
    )
    load_format: Literal["flattened_bucket", "direct"] | None = Field(
        default=None, description="Of the pickles: `flattened_bucket`, or left out (`direct` means the same here)."
    )
    selector: Literal["all", "target"] = _SELECTOR
    flush_cache: Any = _FLUSH
    torch_empty_cache: Any = _IGNORED


class BeginUpdate(Body):
    """A bracket: the buckets until /end_weight_update become visible together."""

    timeout: Seconds = None
    selector: Literal["all", "target"] = _SELECTOR


class EndUpdate(Body):
    """The end of a bracket."""

    weight_version: Name | None = _LABEL
    abort_all_requests: bool = _ABORT
    transfer_id: Name | None = _TRANSFER
    in_place: bool = _IN_PLACE
    timeout: Seconds = None
    flush_cache: Any = _FLUSH


class AbortUpdate(Body):
    """Give a bracket up."""

    transfer_id: Name | None = _TRANSFER


class InitGroup(Body):
    """A trainer's process group, by SGLang's names."""

    master_address: Text = Field(min_length=1, description="Where rank 0, the trainer, listens.")
    master_port: int = Field(ge=1, le=65535, description="Its port.")
    rank_offset: int = Field(ge=0, le=65536, description="The first rank of this server.")
    world_size: int = Field(ge=2, le=65536, description="Ranks of the whole group.")
    group_name: Name = Field(default=GROUP, description="The name of the group.")
    backend: Literal["nccl", "gloo"] = Field(default="nccl", description="`gloo` for a server on a CPU.")
    timeout: Seconds = None


class DestroyGroup(Body):
    """The group to leave."""

    group_name: Name = Field(default=GROUP, description="The name of the group.")


class WeightsFromDistributed(Push):
    """Tensors that rank 0 of a group broadcasts."""

    tensor_names: list[Text] = Field(alias="names", description="Hugging Face's names, in the order of the broadcasts.")
    dtypes: list[Text] = Field(description="PyTorch's names: `bfloat16`, `float32`, ...")
    shapes: list[list[int]] = Field(description="The shape of each tensor.")
    group_name: Name = Field(default=GROUP, description="The name of the group.")
    load_format: Literal["flattened_bucket"] | None = Field(
        default=None, description="`flattened_bucket`: all tensors come in one broadcast of their bytes."
    )
    selector: Literal["all", "target"] = _SELECTOR
    flush_cache: Any = _FLUSH
    torch_empty_cache: Any = _IGNORED
