"""Bodies of vLLM's control routes. The fields that clients send and that change nothing here are named and ignored."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from headwater.generation.body import Body, Names
from headwater.generation.validation import Name, Text
from headwater.http_api.control.schemas_control import Seconds

PIECE_BYTES = 1 << 30  # vLLM's default of `packed_buffer_size_bytes`
_PACKED = "Tensors come joined in pieces; one ends with the tensor that takes it over `packed_buffer_size_bytes`."
_BUFFERS = Field(default=2, description="Ignored: of the sender.")
_SIZE = Field(default=None, ge=1, le=1 << 40, description="Left out: 1 GiB.")


class InitInfo(Body):
    """Where the trainer makes the group, as rank 0."""

    master_address: Text = Field(min_length=1, description="Where rank 0, the trainer, listens.")
    master_port: int = Field(ge=1, le=65535, description="Its port.")
    rank_offset: int = Field(ge=0, le=65536, description="The first rank of this server.")
    world_size: int = Field(ge=2, le=65536, description="Ranks of the whole group.")
    packed: bool = Field(default=False, description=_PACKED)
    packed_buffer_size_bytes: int | None = _SIZE
    packed_num_buffers: Any = _BUFFERS


class InitEngine(Body):
    """The start of a weight transfer."""

    init_info: InitInfo = Field(description="The group to join.")
    timeout: Seconds = None


class StartUpdate(Body):
    """The start of an update."""

    is_checkpoint_format: Literal[True] = Field(default=True, description="Tensors have Hugging Face's names.")
    timeout: Seconds = None


class UpdateInfo(Body):
    """Tensors that rank 0 broadcasts."""

    tensor_names: list[Text] = Field(alias="names", description="Hugging Face's names, in the order of the broadcasts.")
    dtype_names: list[Text] = Field(description="PyTorch's names: `bfloat16`, `float32`, ...")
    shapes: list[list[int]] = Field(description="The shape of each tensor.")
    packed: bool | None = Field(default=None, description=f"{_PACKED} Left out: as `init_info` said.")
    packed_buffer_size_bytes: int | None = _SIZE
    packed_num_buffers: Any = _BUFFERS


class UpdateWeightsCall(Body):
    """The tensors of one call."""

    update_info: UpdateInfo = Field(description="The tensors.")
    timeout: Seconds = None


class FinishUpdate(Body):
    """The end of an update."""

    weight_version: Name | None = Field(default=None, description="New label; left out: the label stays.")
    timeout: Seconds = None


class Rpc(Body):
    """A method of vLLM's workers, by its name."""

    names: ClassVar[Names] = Names(refuses_unknown=True)
    method: Text = Field(min_length=1, description="The method.")
    args: list[Any] = Field(default_factory=list, description="Its arguments by position.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Its arguments by name.")
    timeout: Seconds = None
