"""Which GPUs an engine and its ranks compute on, and how many engines share each."""

import logging

import msgspec

from headwater.devices.cuda.driver import has_gpu
from headwater.launch.config import ServerArgs

log = logging.getLogger(__name__)


def is_on_gpu(args: ServerArgs) -> bool:
    return args.device == "cuda" or (args.device == "auto" and has_gpu())


def choose_gpus(args: ServerArgs, *, index: int) -> tuple[ServerArgs, tuple[int, ...]]:
    """The arguments of engine `index` of a server, and the GPU of each of its ranks.

    No GPU for a single engine of one rank, which takes PyTorch's current one, and on a CPU. `dp_size` of the result
    counts the engines that share the memory. ValueError if there are too few GPUs.
    """
    if not is_on_gpu(args) or args.dp_size * args.tp_size == 1:
        return args, ()
    gpus, num_sharing = gpus_of(args, index=index, num_found=_num_gpus())
    log.info("engine %d computes on GPU %s", index, ", ".join(map(str, gpus)))
    return msgspec.structs.replace(args, dp_size=num_sharing), gpus


def gpus_of(args: ServerArgs, *, index: int, num_found: int) -> tuple[tuple[int, ...], int]:
    """The GPUs of engine `index`, by their numbers among those of CUDA_VISIBLE_DEVICES, and the engines on each."""
    num_engines, num_ranks = args.dp_size, args.tp_size
    if num_engines * num_ranks <= num_found:
        return tuple(range(index * num_ranks, (index + 1) * num_ranks)), 1
    needed = f"{num_engines * num_ranks} GPUs are needed, and {num_found} can be used"
    if num_ranks > 1:
        engines = f"{num_engines} engines of --tp-size {num_ranks}" if num_engines > 1 else f"--tp-size {num_ranks}"
        raise ValueError(f"{engines}: each rank needs a GPU of its own; {needed}")
    if not num_found or not args.share_gpus:
        remedy = "; --share-gpus puts several engines on one" if num_found else ""
        raise ValueError(f"--dp-size {num_engines}: {needed}{remedy}")
    gpu = index % num_found
    return (gpu,), len(range(gpu, num_engines, num_found))


def _num_gpus() -> int:
    import torch  # a server on a CPU does without

    return torch.cuda.device_count()
