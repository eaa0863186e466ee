"""The group of a trainer and a server: on a CPU by torch.distributed over gloo, on GPUs by NCCL as vLLM's ranks meet.

The server finds the pickle of NCCL's id, a ctypes structure, in a TCPStore that the trainer listens with. All ranks
then add up one number.
"""

import ctypes
import pickle
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from headwater.launch.receiving.nccl_library import NcclCommunicator, NcclLibrary

NAME = "vllm"  # as the server names it (/init_weight_transfer_engine)
TIMEOUT = timedelta(seconds=120)


class Communicator:
    """The trainer's end. `group` has what trl clears when it closes."""

    def __init__(self, process_group: dist.ProcessGroup, store: Any) -> None:
        self._process_group = process_group
        self.group = SimpleNamespace(store=store, socket=None)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        dist.broadcast(tensor, group_src=src, group=self._process_group)


class ncclUniqueId(ctypes.Structure):
    """By vLLM's name, which the pickle has."""

    _fields_ = (("internal", ctypes.c_byte * 128),)


class TrainerCommunicator:
    """The trainer's end on the current GPU."""

    def __init__(self, init_info: dict[str, Any]) -> None:
        host, port, size = (init_info[key] for key in ("master_address", "master_port", "world_size"))
        store = dist.TCPStore(host, port, size, is_master=True, timeout=TIMEOUT, use_libuv=False)
        library = NcclLibrary()
        unique_id = library.unique_id()
        store.set("broadcast_from/0/0", pickle.dumps(ncclUniqueId.from_buffer_copy(unique_id)))
        self._communicator = NcclCommunicator(library, size=size, unique_id=unique_id, rank=0)
        self.group = SimpleNamespace(store=store, socket=None)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0, "the trainer is rank 0"
        self._communicator.broadcast(tensor)


def trainer_init(init_info: dict[str, Any]) -> Communicator | TrainerCommunicator:
    """Become rank 0. Returns when the server's ranks are there."""
    if torch.cuda.is_available():
        return TrainerCommunicator(init_info)
    url = f"tcp://{init_info['master_address']}:{init_info['master_port']}"
    store, rank, size = next(c10d.rendezvous(url, 0, init_info["world_size"], timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    prefixed = c10d.PrefixStore(NAME, store)
    made, _ = c10d._new_process_group_helper(
        size, rank, [], c10d.Backend("gloo"), prefixed, group_name=NAME, timeout=TIMEOUT
    )
    c10d._world.pg_group_ranks[made] = {i: i for i in range(size)}
    return Communicator(made, store)
