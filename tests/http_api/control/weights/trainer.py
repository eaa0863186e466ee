"""A trainer of its own process: it makes a group over gloo and broadcasts, as orders on its standard input say."""

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def join(port: int, world_size: int, name: str) -> dist.ProcessGroup:
    """As slime, verl and SGLang's own tests make the group."""
    timeout = timedelta(seconds=60)
    store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 0, world_size, timeout=timeout))
    store.set_timeout(timeout)
    prefixed = c10d.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(
        size, rank, [], c10d.Backend("gloo"), prefixed, group_name=name, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group


group = None
for line in sys.stdin:
    order = json.loads(line)
    try:
        if "join" in order:
            group = join(**order["join"])
        for shape, dtype, value in order.get("send", ()):
            dist.broadcast(torch.full(shape, value, dtype=getattr(torch, dtype)), group_src=0, group=group)
        print("ok", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
