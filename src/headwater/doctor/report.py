"""The doctor's report: all findings about this machine and this installation."""

import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.machine_speed import MachineSpeed, measure_speed
from headwater.devices.cpu.topology import num_usable_cores
from headwater.doctor import machine
from headwater.doctor.finding import Finding, Level
from headwater.doctor.kernels import kernels
from headwater.doctor.model import model
from headwater.doctor.store import store
from headwater.doctor.torch_build import torch_build
from headwater.launch.default_model import cache_dir
from headwater.version import version

_MEASURED_S = 0.05  # for each rate


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """A store as the flags of `serve` name it."""

    kind: str
    directory: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What the doctor found, in the order of the screen."""

    findings: tuple[Finding, ...]

    @property
    def has_problems(self) -> bool:
        return any(finding.level is Level.PROBLEM for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "has_problems": self.has_problems,
            "findings": [
                {
                    "subject": it.subject,
                    "level": it.level.value,
                    "text": it.text,
                    "remedy": it.remedy,
                    "facts": it.facts,
                }
                for it in self.findings
            ],
        }


def examine(*, model_name: str | None = None, port: int, storage: StoreChoice | None = None) -> Report:
    """Look at everything, in about a second. Imports no PyTorch, compiles and fetches nothing.

    `storage`: a store to try, by writing a page into it.
    """
    found, library = kernels()
    speed = None if library is None else measure_speed(library, num_threads=num_usable_cores(), limit_s=_MEASURED_S)
    tried = () if storage is None else (store(storage.kind, directory=storage.directory, url=storage.url),)
    return Report(
        (
            _installation(),
            machine.processor(),
            found,
            _speed(speed, library),
            machine.memory(),
            machine.gpu(),
            torch_build(),
            model(model_name, speed),
            machine.disk(cache_dir()),
            machine.port(port),
            *tried,
        )
    )


def _installation() -> Finding:
    system = f"{platform.system()} {platform.release()}"
    with suppress(OSError):  # not Linux, or a very small one
        system += f" ({platform.freedesktop_os_release()['PRETTY_NAME']})"
    return Finding(
        "version",
        f"Headwater {version()}, Python {platform.python_version()}, {system}",
        facts={"headwater": version(), "python": sys.version, "system": system, "executable": sys.executable},
    )


def _speed(speed: MachineSpeed | None, library: KernelLibrary | None) -> Finding:
    if speed is None or library is None:
        return Finding("speed", "not measured, without kernels", Level.NOTE)
    return Finding(
        "speed",
        f"reads {speed.read_gb_s:.0f} GB/s, {speed.gflop_s:,.0f} GFLOP/s in float32, {speed.int8_gop_s:,.0f} GOP/s in "
        f"int8, on {speed.num_threads} thread" + ("" if speed.num_threads == 1 else "s"),
        facts={
            "read_gb_s": round(speed.read_gb_s, 2),
            "gflop_s": round(speed.gflop_s, 1),
            "int8_gop_s": round(speed.int8_gop_s, 1),
            "num_threads": speed.num_threads,
        },
    )
