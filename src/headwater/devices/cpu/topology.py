"""Which cores, instructions and memory this process may use."""

import math
import os
from pathlib import Path

_CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")
_CGROUP_MEMORY_CURRENT = Path("/sys/fs/cgroup/memory.current")


def num_usable_cores() -> int:
    """Cores of this process: its affinity mask, cut by the cgroup's CPU quota and by OMP_NUM_THREADS."""
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    quota, _, period = _read(_CGROUP_CPU_MAX).partition(" ")
    if quota.isdigit() and period.isdigit():
        num_cores = min(num_cores, math.ceil(int(quota) / int(period)))
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        num_cores = min(num_cores, int(wanted))
    return max(1, num_cores)


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions as the Linux kernel names them; empty elsewhere."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def free_memory_bytes() -> int:
    """Memory that can be allocated without swapping, within the cgroup's limit."""
    free = 0
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read(_CGROUP_MEMORY_MAX), _read(_CGROUP_MEMORY_CURRENT)
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return max(0, free)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # not Linux, or not in a cgroup
        return ""
