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
from interpreted_triton import patch_language_once

HAS_CARDS = torch.cuda.device_count() >= 2
CONFIG = tiny_config(num_layers=1, hidden_size=64, head_dim=16)


def place_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if HAS_CARDS else torch.device("cpu")


def gpu_runner(*, ranks: CudaRanks | None) -> GpuRunner:
    """With CUDA graphs where there are cards."""
    device = CudaDevice(place_of(0), ranks=ranks)
    loaded = load_tiny(device, CONFIG)
    return GpuRunner(
        loaded,
        device,
        layout=loaded.kv_layout(page_size=4),
        num_pages=32,
        max_running=4,
        max_context=64,
        graph_sizes=(1, 2, 4) if HAS_CARDS else (),
    )


def ranked_gpu_runner(rank: int, rendezvous: Path) -> GpuRunner:
    place = place_of(rank)
    return gpu_runner(ranks=CudaRanks(rank=rank, size=2, rendezvous=rendezvous, torch_device=place, limit_s=60.0))


def main(rendezvous: Path) -> None:
    if not HAS_CARDS:  # interpreted, these kernels take long
        patch_language_once()
        cuda_linear.suits = cuda_linear.suits_gated = lambda *_: False
        triton_decode.split_limits = lambda *_: (2, 64)
    runner = ranked_gpu_runner(1, rendezvous)
    while True:
        try:
            plan = pickle.load(sys.stdin.buffer)
        except EOFError:
            torch.distributed.destroy_process_group()  # its threads may not outlive the interpreter
            return
        runner.launch(plan).collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
