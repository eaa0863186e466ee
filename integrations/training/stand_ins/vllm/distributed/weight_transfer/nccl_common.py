"""The group of a trainer and a server, made with torch.distributed over gloo instead of NCCL."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

NAME = "vllm"  # as the server names it (/init_weight_transfer_engine)
TIMEOUT = timedelta(seconds=120)


class Communicator:
    """The trainer's end. `group` has what trl clears when it closes."""

    def __init__(self, process_group: dist.ProcessGroup, store: Any) -> None:
        self._process_group = process_group
        self.group = SimpleNamespace(store=store, socket=None)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        dist.broadcast(tensor, group_src=src, group=self._process_group)


def trainer_init(init_info: dict[str, Any]) -> Communicator:
    """Become rank 0. Returns when the server's ranks are there."""
    url = f"tcp://{init_info['master_address']}:{init_info['master_port']}"
    store, rank, size = next(c10d.rendezvous(url, 0, init_info["world_size"], timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    prefixed = c10d.PrefixStore(NAME, store)
    made, _ = c10d._new_process_group_helper(
        size, rank, [], c10d.Backend("gloo"), prefixed, group_name=NAME, timeout=TIMEOUT
    )
    c10d._world.pg_group_ranks[made] = {i: i for i in range(size)}
    return Communicator(made, store)
