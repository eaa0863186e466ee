"""Whether this machine has an NVIDIA GPU, without PyTorch where there is no driver: importing it takes seconds."""

import ctypes
import importlib.util
import logging

_DRIVER = "libcuda.so.1"

_log = logging.getLogger(__name__)


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def has_gpu() -> bool:
    """Whether PyTorch can compute on a GPU here. Imports it only if NVIDIA's driver is installed."""
    if not has_driver():
        return False
    if importlib.util.find_spec("torch") is None:
        _log.warning("an NVIDIA driver is installed, but PyTorch is not: computing on the CPU; for the GPU, "
                     "pip install 'headwater[gpu]' (in a clone: GPU=1 make setup)")  # fmt: skip
        return False
    import torch

    return torch.cuda.is_available()
