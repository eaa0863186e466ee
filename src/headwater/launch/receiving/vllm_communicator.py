"""vLLM's communicator, as ranks behind the first see it: NCCL, whose id rank 0 leaves in a store of PyTorch's.

After StatelessProcessGroup and PyNcclCommunicator of vLLM 0.32: the trainer listens with a TCPStore, sets the pickle of
a ctypes structure under a fixed key, and every rank adds up one number before the first broadcast.
"""

import pickletools
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from headwater.launch.receiving.nccl_library import NcclCommunicator, NcclLibrary
from headwater.messages.receiving import JoinGroup

ID_KEY = "broadcast_from/0/0"
_ID_BYTES = 128


class VllmCommunicator:
    """A member. `broadcast` receives what rank 0 sends."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self._communicator = communicator

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Enqueue the broadcasts into these tensors, in this order."""
        for tensor in tensors:
            self._communicator.broadcast(tensor)


def join_vllm(call: JoinGroup) -> VllmCommunicator:
    """Meet the trainer on the current GPU. RuntimeError if it does not come in time, or NCCL refuses."""
    store = dist.TCPStore(  # type: ignore[reportPrivateImportUsage]  # documented there
        call.master_address,
        call.master_port,
        call.world_size,
        is_master=False,
        timeout=timedelta(seconds=call.timeout_s),
        use_libuv=False,  # as the trainer's
    )
    found = unique_id(store.get(ID_KEY))
    return VllmCommunicator(NcclCommunicator(NcclLibrary(), size=call.world_size, unique_id=found, rank=call.rank))


def unique_id(pickled: bytes) -> bytes:
    """NCCL's id within the pickle, which is read and not executed. ValueError if it holds anything else."""
    try:
        arguments = [argument for _, argument, _ in pickletools.genops(pickled)]
    except Exception as error:  # noqa: BLE001  it names no errors of its own
        raise ValueError(f"the trainer's id of NCCL is no pickle: {error}") from None
    found = [argument for argument in arguments if isinstance(argument, bytes)]
    is_id = any(isinstance(argument, str) and "ncclUniqueId" in argument for argument in arguments)
    if not is_id or [len(each) for each in found] != [_ID_BYTES]:
        raise ValueError("the trainer's store holds something else than an id of NCCL")
    return found[0]
