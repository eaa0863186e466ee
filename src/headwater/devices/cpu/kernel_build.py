"""Compile the CPU kernels: `python -m headwater.devices.cpu.kernel_build` builds them for this machine.

One library per instruction set, out of the same sources. A library that the package ships is preferred. Else it is
compiled into the user's cache. The name of a library is a hash of its sources and options, so a stale one is never
loaded. Compilers: the system's, else clang of the `ziglang` wheel. This module runs before anything is installed.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from headwater.devices.cpu.topology import cpu_flags, num_usable_cores

SOURCES = Path(__file__).parent / "kernels"
PACKAGED = Path(__file__).parent / "libraries"
_COMPILERS = ("cc", "gcc", "clang")
# Contraction would round a * b + c once or twice as the compiler likes, and a row's bits would depend on the tile.
_OPTIONS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-Wall", "-Wextra", "-fPIC", "-pthread")
_INCLUDED = ("linear", "simd")  # folders of SOURCES
_LINK = ("-shared", "-lm")
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_TIMEOUT_S = 300


@dataclass(frozen=True)
class InstructionSet:
    """What a library is compiled for, and the flags (Linux's names) that a CPU needs to run it."""

    name: str
    machine: str  # platform.machine()
    options: tuple[str, ...]  # of gcc and clang
    zig_cpu: str
    flags: frozenset[str]


_V3 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_AMX = frozenset({"amx_tile", "amx_int8", "amx_bf16"})
# asm/unistd_64.h, asm/prctl.h, and the number of the tile registers among the parts of a thread's state
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18

INSTRUCTION_SETS = {
    isa.name: isa
    for isa in (  # the best first
        InstructionSet(
            name="avx512_bf16",
            machine="x86_64",
            options=(*_WIDE, "-mavx512vnni", "-mavx512bf16"),
            zig_cpu="x86_64_v4+avx512vnni+avx512bf16",
            flags=_V4 | {"avx512_vnni", "avx512_bf16"},
        ),
        InstructionSet(
            name="avx512_amx",
            machine="x86_64",
            options=(*_WIDE, "-mavx512vnni", "-mavx512bf16", "-mavx512fp16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
            zig_cpu="x86_64_v4+avx512vnni+avx512bf16+avx512fp16+amx_tile+amx_int8+amx_bf16",
            flags=_V4 | {"avx512_vnni", "avx512_bf16", "avx512_fp16"} | _AMX,
        ),
        InstructionSet(
            name="avx512_vnni",
            machine="x86_64",
            options=(*_WIDE, "-mavx512vnni"),
            zig_cpu="x86_64_v4+avx512vnni",
            flags=_V4 | {"avx512_vnni"},
        ),
        InstructionSet(name="avx512", machine="x86_64", options=_WIDE, zig_cpu="x86_64_v4", flags=_V4),
        InstructionSet(
            name="avx_vnni",
            machine="x86_64",
            options=("-march=x86-64-v3", "-mavxvnni"),
            zig_cpu="x86_64_v3+avxvnni",
            flags=_V3 | {"avx_vnni"},
        ),
        InstructionSet(
            name="avx2", machine="x86_64", options=("-march=x86-64-v3",), zig_cpu="x86_64_v3", flags=frozenset(_V3)
        ),
        InstructionSet(
            name="neon_i8mm",
            machine="aarch64",
            options=("-march=armv8.2-a+dotprod+i8mm",),
            zig_cpu="generic+v8_2a+dotprod+i8mm",
            flags=frozenset({"asimd", "asimddp", "i8mm"}),
        ),
        InstructionSet(
            name="neon",
            machine="aarch64",
            options=("-march=armv8.2-a+dotprod",),
            zig_cpu="generic+v8_2a+dotprod",
            flags=frozenset({"asimd", "asimddp"}),
        ),
    )
}


def usable_instruction_sets() -> list[InstructionSet]:
    """Those that this CPU runs, the best first. AMX counts only if Linux grants this process its registers."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    flags = cpu_flags()
    if flags >= _AMX and not may_use_tile_registers():
        flags -= _AMX
    return [isa for isa in INSTRUCTION_SETS.values() if isa.machine == machine and isa.flags <= flags]


@functools.cache
def may_use_tile_registers() -> bool:
    """Ask Linux for AMX's registers. The permission holds for all threads of this process."""
    if sys.platform != "linux":
        return False
    syscall = ctypes.CDLL(None).syscall
    syscall.restype = ctypes.c_long
    return syscall(*map(ctypes.c_long, (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA))) == 0


def chosen_instruction_set() -> InstructionSet | None:
    """HEADWATER_CPU_ISA's, else the best that this CPU runs, else None. ValueError if the wish cannot be met."""
    usable = usable_instruction_sets()
    wanted = os.environ.get("HEADWATER_CPU_ISA")
    if not wanted:
        return usable[0] if usable else None
    if wanted not in INSTRUCTION_SETS:
        raise ValueError(f"HEADWATER_CPU_ISA={wanted} is unknown; it takes {', '.join(INSTRUCTION_SETS)}")
    isa = INSTRUCTION_SETS[wanted]
    if isa not in usable:
        missing = ", ".join(sorted(isa.flags - cpu_flags()))
        if not missing and isa.flags >= _AMX:
            raise ValueError(f"HEADWATER_CPU_ISA={wanted} needs AMX, whose registers Linux does not grant this process")
        missing = missing or f"a machine of kind {isa.machine}"
        raise ValueError(f"HEADWATER_CPU_ISA={wanted} needs what this CPU lacks: {missing}")
    return isa


def library_name(isa: InstructionSet, *, suffix: str = _SUFFIX) -> str:
    """Of the sources in this folder: a library of others has another name, and is never loaded."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(SOURCES.rglob("*.[ch]")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    digest.update(" ".join((*_OPTIONS, *_LINK, *isa.options)).encode())
    return f"kernels-{isa.name}-{digest.hexdigest()}{suffix}"


def find(isa: InstructionSet) -> Path | None:
    """The library of these sources: the packaged one, else the cached one, else None."""
    name = library_name(isa)
    return next((path for folder in (PACKAGED, _cache()) if (path := folder / name).exists()), None)


def build(isa: InstructionSet) -> Path:
    """The path of the library, compiled into the cache if it does not exist. RuntimeError if that is impossible."""
    if found := find(isa):
        return found
    target = _cache() / library_name(isa)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that a process that starts meanwhile never loads half a file.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder) / target.name
        compile_library(isa, output)
        output.replace(target)
    return target


def compile_library(
    isa: InstructionSet,
    output: Path,
    *,
    sources: Sequence[Path] | None = None,
    extra_options: Sequence[str] = (),
    compiler: Sequence[str] | None = None,
) -> None:
    """Compile `sources` (the kernels) for `isa` into `output`, on all cores.

    `compiler` is a command, by default the first of this machine that succeeds. RuntimeError without one, or with the
    errors of all.
    """
    failures = []
    for command in [list(compiler)] if compiler else _compilers(isa):
        try:
            return _compile(command, output, sources or sorted(SOURCES.rglob("*.c")), extra_options)
        except RuntimeError as error:  # too old for these options, or without the system's headers
            failures.append(str(error))
    looked_for = f"no C compiler found (looked for {', '.join(_COMPILERS)} and the Python package ziglang)"
    raise RuntimeError("\n".join(failures) or looked_for)


def _compile(command: Sequence[str], output: Path, sources: Sequence[Path], extra_options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        objects = {path: Path(folder) / f"{index}.o" for index, path in enumerate(sources)}
        # the extra options last, so that they may lower the optimisation
        options = (*_OPTIONS, f"-I{SOURCES}", *(f"-I{SOURCES / name}" for name in _INCLUDED), *extra_options)

        def compile_one(source: Path) -> None:
            _run([*command, *options, "-c", str(source), "-o", str(objects[source])])

        largest_first = sorted(sources, key=lambda path: -path.stat().st_size)
        with ThreadPoolExecutor(num_usable_cores()) as pool:
            list(pool.map(compile_one, largest_first))
        _run([*command, *_OPTIONS, *extra_options, *map(str, objects.values()), "-o", str(output), *_LINK])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed:\n{done.stderr}")


def has_compiler(isa: InstructionSet) -> bool:
    """Whether `build` finds a compiler."""
    return bool(_compilers(isa))


def _compilers(isa: InstructionSet) -> list[list[str]]:
    """The commands that compile for `isa`, without the common options, the best first."""
    system = [[path, *isa.options] for name in _COMPILERS if (path := shutil.which(name))]
    has_zig = importlib.util.find_spec("ziglang") is not None
    return system[:1] + ([[sys.executable, "-m", "ziglang", "cc", f"-mcpu={isa.zig_cpu}"]] if has_zig else [])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headwater" / "native"


def main() -> int:
    """Build the best set's library and print its path. 1 if another compiler would help; numpy computes without one."""
    isa = chosen_instruction_set()
    if isa is None:
        print("CPU kernels not built: they are not written for this CPU", file=sys.stderr)
        return 0
    try:
        print(f"CPU kernels ({isa.name}): {build(isa)}")
    except RuntimeError as error:
        print(f"CPU kernels not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
