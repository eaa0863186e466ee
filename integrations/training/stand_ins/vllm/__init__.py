"""Stands for vLLM on a trainer's side, without a GPU: what trl imports of it to push weights, over PyTorch's gloo.

trl broadcasts weights through vLLM's communicator, which needs NCCL. Here the same calls go through a group of
torch.distributed. The names are vLLM's, since trl imports them; the code is ours. Nothing here generates text.
"""

__version__ = "0.31.0"  # the newest whose calls trl 1.16.0 knows


class NotHere:
    """In place of vLLM's engine: trl imports it, and uses it only where vLLM runs in the trainer's process."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("this stand-in for vLLM pushes weights and nothing else: use vllm_mode='server'")


LLM = RequestOutput = SamplingParams = NotHere
