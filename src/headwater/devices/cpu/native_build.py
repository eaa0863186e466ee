"""Compile the native CPU kernels: `python -m headwater.devices.cpu.native_build`.

The library is compiled for this machine and lies in the user's cache. Its name is a hash of the sources, the compiler
options and the CPU's features, so a stale or foreign library is never loaded. Without a library (no compiler, or an
unsupported CPU) the server computes in plain PyTorch.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from headwater.devices.cpu.topology import cpu_flags

SOURCES = Path(__file__).parent / "native"
REQUIRED_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
_COMPILERS = ("cc", "gcc", "clang")
_OPTIONS = ("-O3", "-march=native", "-std=gnu11", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread")
_TIMEOUT_S = 300

logger = logging.getLogger(__name__)


def missing_cpu_flags() -> list[str]:
    """Instructions that the kernels need and this CPU lacks."""
    return sorted(REQUIRED_FLAGS - cpu_flags())


def library_path() -> Path:
    """Where the library for this machine and these sources is, or would be."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(" ".join((*_OPTIONS, *sorted(cpu_flags()))).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "headwater" / "native" / f"cpu-{digest.hexdigest()}.so"


def build() -> Path:
    """Compile the library if it does not exist yet, and return its path. RuntimeError if that is impossible."""
    target = library_path()
    if target.exists():
        return target
    if missing := missing_cpu_flags():
        raise RuntimeError(f"the native kernels need CPU instructions that are missing: {', '.join(missing)}")
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError(f"no C compiler found (looked for {', '.join(_COMPILERS)})")
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    # Renamed when complete, so that a process that starts meanwhile never loads half a file.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder) / target.name
        command = [compiler, *_OPTIONS, *sources, "-o", str(output), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} failed:\n{done.stderr}")
        output.replace(target)
    return target


def main() -> None:
    """Build, and print the result. A failure is no error: the kernels are optional."""
    try:
        print(f"native CPU kernels: {build()}")
    except RuntimeError as error:
        print(f"native CPU kernels not built, the CPU will compute in plain PyTorch: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
