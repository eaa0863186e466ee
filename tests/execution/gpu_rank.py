"""A rank of test_gpu_ranks.py. As a script it is rank 1, which computes the plans that come on its standard input."""

import pickle
import sys
from pathlib import Path

import torch
from ranked_models import load_tiny, tiny_config

from headwater.devices.cuda import linear as cuda_linear
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels import decode as triton_decode
from headwater.devices.cuda.ranks.group import CudaRanks
from headwater.execution.gpu_runner import GpuRunner
from headwater.models.config import ModelConfig
from interpreted_triton import patch_language_once

CPU = torch.device("cpu")


def gpu_runner(config: ModelConfig, *, ranks: CudaRanks | None) -> GpuRunner:
    device = CudaDevice(CPU, ranks=ranks)
    loaded = load_tiny(device, config)
    layout = loaded.kv_layout(page_size=4)
    return GpuRunner(loaded, device, layout=layout, num_pages=32, max_running=4, max_context=64)


class GpuRank:
    def __init__(self, rank: int, rendezvous: Path) -> None:
        self.ranks = CudaRanks(rank=rank, size=2, rendezvous=rendezvous, torch_device=CPU, limit_s=60.0)
        self.runner = gpu_runner(tiny_config(num_layers=1), ranks=self.ranks)


def main(rendezvous: Path) -> None:
    patch_language_once()
    cuda_linear.suits = cuda_linear.suits_gated = lambda *_: False  # interpreted, these kernels take long
    triton_decode.split_limits = lambda *_: (2, 64)
    runner = GpuRank(1, rendezvous).runner
    while True:
        try:
            plan = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        runner.launch(plan).collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
