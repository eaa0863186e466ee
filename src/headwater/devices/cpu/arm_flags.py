"""Instruction set extensions of an AArch64 processor, by the names that Linux gives them."""

import ctypes
import platform
import sys

IS_ARM = platform.machine() in ("aarch64", "arm64")

# What the kernels ask for: the entry of Linux's auxiliary vector and the bit in it (asm/hwcap.h), and macOS's name.
_HWCAP, _HWCAP2 = 16, 26
_EXTENSIONS = {
    "asimd": (_HWCAP, 1, "hw.optional.AdvSIMD"),
    "asimddp": (_HWCAP, 20, "hw.optional.arm.FEAT_DotProd"),
    "i8mm": (_HWCAP2, 13, "hw.optional.arm.FEAT_I8MM"),
    "bf16": (_HWCAP2, 14, "hw.optional.arm.FEAT_BF16"),
}


def arm_flags() -> frozenset[str]:
    """Of those that the kernels ask for, the ones that this processor has; empty where the system does not say.

    Linux is asked by getauxval: /proc/cpuinfo says the same, but under qemu-user it is the host's.
    """
    has = _has_on_macos if sys.platform == "darwin" else _has_on_linux if sys.platform == "linux" else None
    return frozenset(name for name in _EXTENSIONS if has is not None and has(name))


def _has_on_linux(name: str) -> bool:
    entry, bit, _ = _EXTENSIONS[name]
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = (ctypes.c_ulong,), ctypes.c_ulong
    return bool(getauxval(entry) >> bit & 1)


def _has_on_macos(name: str) -> bool:
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    sysctl_name = _EXTENSIONS[name][2].encode()
    failed = ctypes.CDLL(None).sysctlbyname(sysctl_name, ctypes.byref(value), ctypes.byref(size), None, 0)
    return not failed and value.value != 0
