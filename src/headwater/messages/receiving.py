"""What the API process says to a process that receives tensors with PyTorch, and its answers."""

from typing import Any

import msgspec

from headwater.messages.base import Struct

VLLM = "vllm"  # a backend: NCCL, by the way in which vLLM's ranks meet


class ReceiverStart(Struct):
    """The first frame. `parent_pid`: the process dies with it."""

    parent_pid: int


class JoinGroup(Struct, tag="join"):
    """Become `rank` of a process group whose rank 0, a trainer, listens on the address."""

    master_address: str
    master_port: int
    rank: int
    world_size: int
    group_name: str
    backend: str  # one of PyTorch's, or VLLM
    device: int | None  # a GPU; None: host memory
    timeout_s: float


class ReceiveBucket(Struct, tag="receive"):
    """Receive the tensors that rank 0 broadcasts, in this order. `path`: of the file for them; empty: drop them.

    `piece_bytes`: flattened tensors come in pieces, each of which ends with the tensor that takes it over this size.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # as safetensors names them
    shapes: tuple[tuple[int, ...], ...]
    is_flattened: bool  # they come as one piece, as bytes
    path: str
    spare_bytes: int = -1  # keep a copy on the GPU until `DropFromGpu`, if so many bytes stay free there; < 0: never
    piece_bytes: int = 0  # 0: one piece


class CopyFromGpu(Struct, tag="copy_from_gpu"):
    """Write tensors of another process of this host, by their CUDA handles, to the file `path`."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    handles: tuple[tuple[Any, ...], ...]  # arguments of PyTorch's rebuild_cuda_tensor, without its classes
    first_bytes: tuple[int | None, ...]  # of parts of a flattened bucket
    path: str
    spare_bytes: int = -1


class DropFromGpu(Struct, tag="drop_from_gpu"):
    """Free the copies in GPU memory, once their files are whole."""


class Ok(Struct, tag="ok"):
    """Done. `took_s`: without the wait for the first byte, where that can be known."""

    took_s: float = 0.0


class NotDone(Struct, tag="not_done"):
    message: str


ToReceiver = JoinGroup | ReceiveBucket | CopyFromGpu | DropFromGpu
FromReceiver = Ok | NotDone
decode_to_receiver = msgspec.msgpack.Decoder(ToReceiver).decode
decode_from_receiver = msgspec.msgpack.Decoder(FromReceiver).decode
