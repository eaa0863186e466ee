"""Ranks on GPUs where there is none: gloo and Triton's interpreter.

As a script it is a rank process; with a model and prompts (JSON) it is an engine of two, which prints its answers.
"""

import json
import sys
import threading
from typing import Any

import torch
from triton.runtime import interpreter

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels import decode as triton_decode
from headwater.devices.cuda.products import linear as cuda_linear
from headwater.launch import cuda_placement
from headwater.launch.engine_api import Engine
from headwater.launch.ranks import engine_gpus, gpu_group, process, start
from interpreted_triton import hasten

NUM_CARDS = 2
# the second prompt takes the first one's pages to the host, from where the third prompt needs them
ARGS: dict[str, Any] = {
    "dtype": "float32", "page_size": 16, "max_total_tokens": 112, "max_running_requests": 1, "log_level": "warning",
    "enable_hierarchical_cache": True, "hicache_ratio": 3, "hicache_restore_policy": "always",
}  # fmt: skip
SAMPLING = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}


def pretend_cards() -> None:
    """Cards are this CPU, with as few interpreted programs as will do."""
    hasten()
    lock, run = threading.Lock(), interpreter.GridExecutor.__call__

    def run_alone(self: Any, *arguments: Any, **options: Any) -> Any:
        with lock:  # the interpreter has one grid for all threads
            return run(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = run_alone
    cuda_linear.suits = cuda_linear.suits_gated = lambda *_: False
    triton_decode.split_limits = lambda *_: (2, 64)
    engine_gpus._num_gpus = lambda: NUM_CARDS
    gpu_group.device_of = lambda card: torch.device("cpu")
    cuda_placement.register_on = lambda device, address, num_bytes: None
    cuda_placement.unregister_with_driver = lambda address: None
    cuda_placement.chunk_sizes = lambda largest: (min(largest, 8),)
    CudaDevice.free_memory_bytes = lambda self: (1 << 30) + self.ranks.rank  # type: ignore[method-assign]


def answer(model: str, prompts: list[list[int]]) -> list[list[int]]:
    start.RANK_COMMAND = (sys.executable, __file__)
    with Engine(model, device="cuda", tp_size=NUM_CARDS, **ARGS) as engine:
        return [engine.generate(input_ids=ids, sampling_params=SAMPLING)["output_ids"] for ids in prompts]


if __name__ == "__main__":
    pretend_cards()
    if len(sys.argv) == 1:
        sys.exit(process.main())
    print(json.dumps(answer(sys.argv[1], json.loads(sys.argv[2]))))
