"""NVIDIA Dynamo's index of cached blocks as a process: it subscribes to events, and answers questions on stdin.

Runs in the environment of `make routers`, which has the wheel, and knows nothing of Headwater. A line of stdin is a
request in JSON; a line of stdout answers it with the number of leading blocks that the index knows, by tier.
"""

import asyncio
import json
import sys

from dynamo._core import SelectionService

MODEL = {"model_name": "m", "tenant_id": "t"}


async def main(endpoint: str, replay_endpoint: str, block_size: str) -> None:
    service = SelectionService(indexer_threads=1)
    worker = {
        "worker_id": 7, "endpoint": "x://a", "block_size": int(block_size), "max_num_batched_tokens": 8192,
        "data_parallel_start_rank": 0, "data_parallel_size": 1, "kv_events_endpoints": {0: endpoint},
    }  # fmt: skip
    await service.upsert_worker(MODEL | worker | ({"replay_endpoint": replay_endpoint} if replay_endpoint else {}))
    print(json.dumps("ready"), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        scores = await service.overlap_scores(MODEL | json.loads(line))
        (found,) = scores["workers"] or [{}]
        names = {"device": "device_blocks", "host": "host_pinned_blocks", "storage": "disk_blocks"}
        print(json.dumps({tier: found.get(name, 0) for tier, name in names.items()}), flush=True)
    service.shutdown()


asyncio.run(main(*sys.argv[1:]))
