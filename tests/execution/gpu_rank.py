"""A rank of test_gpu_ranks.py. As a script it is rank 1, which computes the plans that come on its standard input."""

import faulthandler
import pickle
import sys
import time
from pathlib import Path

import torch
from ranked_models import load_tiny, tiny_config

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels import decode as triton_decode
from headwater.devices.cuda.products import linear as cuda_linear
from headwater.devices.cuda.ranks.group import CudaRanks
from headwater.execution.gpu_runner import GpuRunner
from headwater.models.experts.config import GPT_OSS_EXPERTS, ExpertsConfig
from interpreted_triton import hasten

HAS_CARDS = torch.cuda.device_count() >= 2
_SIZES: dict[str, object] = {"num_layers": 1, "hidden_size": 64, "head_dim": 16}
_EXPERTS = ExpertsConfig(3, 2, 48, True, GPT_OSS_EXPERTS.names, has_bias=True, activation="clamped_swiglu")
CONFIGS = {
    "all-optional": tiny_config(**_SIZES),
    # what ranks cut in ways of its own: matrices that are fused, norms of all heads, sinks; experts with biases
    "fused-and-whole": tiny_config(
        **_SIZES, fused=("qkv_proj", "gate_up_proj"), mlp_bias=False, qk_norm_whole=True, has_sinks=True
    ),
    "experts-with-biases": tiny_config(**_SIZES, mlp_bias=False, qk_norm=False, experts=_EXPERTS),
}
LIMIT_S = 75 if HAS_CARDS else 1200  # of each process; kernels are compiled, or interpreted (40 s of CPU) meanwhile
_began_s = time.monotonic()


def say(rank: int, stage: str) -> None:
    """To standard error, which is shown where the test fails: a process that hangs in a GPU's driver says no more."""
    print(f"[{time.monotonic() - _began_s:5.1f} s] rank {rank}: {stage}", file=sys.stderr, flush=True)


def place_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if HAS_CARDS else torch.device("cpu")


def gpu_runner(name: str, *, ranks: CudaRanks | None) -> GpuRunner:
    """Of one of CONFIGS; with CUDA graphs where there are cards."""
    device = CudaDevice(place_of(0), ranks=ranks)
    loaded = load_tiny(device, CONFIGS[name])
    return GpuRunner(
        loaded,
        device,
        layout=loaded.kv_layout(page_size=4),
        num_pages=32,
        max_running=4,
        max_context=64,
        graph_sizes=(1, 4) if HAS_CARDS else (),
        max_drafted=4,
    )


def ranked_gpu_runner(name: str, rank: int, rendezvous: Path) -> GpuRunner:
    say(rank, "waits for the other rank")
    ranks = CudaRanks(rank=rank, size=2, rendezvous=rendezvous, torch_device=place_of(rank), limit_s=LIMIT_S)
    say(rank, f"has met it; sums are {'of the library' if ranks.one_shot is None else 'our own'}")
    runner = gpu_runner(name, ranks=ranks)
    say(rank, "has a runner")
    return runner


def leave(rank: int, runner: GpuRunner) -> None:
    """End the group; its sums are in the graphs of the runner, which cannot compute after this."""
    say(rank, "leaves")
    runner.replace_model(None)
    ranks = runner._ranks
    assert ranks is not None
    ranks.close()
    say(rank, "has left")


def main(name: str, rendezvous: Path) -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    if not HAS_CARDS:  # interpreted, these kernels take long
        hasten()
        cuda_linear.suits = cuda_linear.suits_gated = lambda *_: False
        triton_decode.split_limits = lambda *_: (2, 64)
    runner = ranked_gpu_runner(name, 1, rendezvous)
    for step in range(1000):
        try:
            plan = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        runner.launch(plan).collect()
        say(1, f"has computed step {step}")
    leave(1, runner)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
