"""The PyTorch that is installed, beside NVIDIA's driver. Imports no PyTorch, which would take seconds."""

import ctypes
import re
from importlib.metadata import PackageNotFoundError, version

from headwater.devices.cuda.driver import has_driver
from headwater.doctor.finding import Finding, Level

_REINSTALL = "install the build of PyTorch for it: https://pytorch.org/get-started/locally has the command"


def torch_build() -> Finding:
    """Whether the installed build of PyTorch can use the driver that is there."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return Finding("torch", "not installed; a server on a CPU needs none", facts={"torch": None})
    wanted, offered = cuda_of(installed), driver_cuda() if has_driver() else None
    facts = {"torch": installed, "cuda": wanted, "driver_cuda": offered}
    if offered is None:
        return Finding("torch", f"{installed}; no NVIDIA driver, so it is not used", facts=facts)
    if installed.endswith("+cpu"):
        text = f"{installed} is a build without CUDA: computes on the CPU, though there is an NVIDIA driver"
        return Finding("torch", text, Level.PROBLEM, _REINSTALL, facts)
    if wanted is not None and wanted[0] > offered[0]:  # within one major version, CUDA is compatible
        text = f"{installed} needs a driver for CUDA {_dotted(wanted)}; this one is for {_dotted(offered)}"
        return Finding("torch", text, Level.PROBLEM, f"update NVIDIA's driver, or {_REINSTALL}", facts)
    return Finding("torch", f"{installed}, driver for CUDA {_dotted(offered)}", facts=facts)


def cuda_of(installed: str) -> tuple[int, int] | None:
    """The version of CUDA in a version of PyTorch: `2.11.0+cu130` has 13.0. None if it does not say."""
    found = re.search(r"\+cu(\d+)(\d)$", installed)
    return (int(found[1]), int(found[2])) if found else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest version of CUDA that the driver supports."""
    number = ctypes.c_int(0)
    try:
        is_known = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if is_known else None


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
