"""Which AArch64 sets run here: a set chosen beyond the processor would end the server with an illegal instruction."""

import ctypes
import platform
import sys

import pytest

from headwater.devices.cpu import arm_flags as module
from headwater.devices.cpu.arm_flags import IS_ARM, arm_flags
from headwater.devices.cpu.kernel_build import usable_instruction_sets


class Getauxval:
    """glibc's, of a processor with these words."""

    def __init__(self, hwcap: int, hwcap2: int) -> None:
        self.words = {16: hwcap, 26: hwcap2}

    def __call__(self, entry: int) -> int:
        return self.words[entry]


class Sysctlbyname:
    """macOS's: 0 and a value for a known name, -1 for an unknown one."""

    def __init__(self, values: dict[str, int]) -> None:
        self.values = values

    def __call__(self, name: bytes, value: object, size: object, new: None, new_size: int) -> int:
        if name.decode() not in self.values:
            return -1
        ctypes.memmove(value, ctypes.byref(ctypes.c_int(self.values[name.decode()])), 4)  # type: ignore[arg-type]
        return 0


class Library:
    def __init__(self, **functions: object) -> None:
        self.__dict__ |= functions


@pytest.mark.parametrize(("hwcap", "hwcap2", "expected"), [
    (1 << 1, 0, {"asimd"}),  # Cortex-A72
    (1 << 1 | 1 << 20, 0, {"asimd", "asimddp"}),  # Neoverse N1
    (1 << 1 | 1 << 20, 1 << 13 | 1 << 14, {"asimd", "asimddp", "i8mm", "bf16"}),  # Neoverse V1
    (0, 0, set()),
])  # fmt: skip
def test_linux_says_it_in_the_auxiliary_vector(
    monkeypatch: pytest.MonkeyPatch, hwcap: int, hwcap2: int, expected: set[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: Library(getauxval=Getauxval(hwcap, hwcap2)))
    assert arm_flags() == expected


def test_macos_says_it_by_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that an older macOS does not know is an extension that it does not report."""
    names = {"hw.optional.AdvSIMD": 1, "hw.optional.arm.FEAT_DotProd": 1, "hw.optional.arm.FEAT_BF16": 0}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: Library(sysctlbyname=Sysctlbyname(names)))
    assert arm_flags() == {"asimd", "asimddp"}


def test_other_systems_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "freebsd14")
    assert arm_flags() == frozenset()


@pytest.mark.skipif(not IS_ARM, reason="asks an AArch64 processor")
def test_this_processor_can_be_asked() -> None:
    assert "asimd" in arm_flags()
    assert {isa.machine for isa in usable_instruction_sets()} <= {"aarch64"}, platform.machine()
