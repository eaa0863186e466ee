"""Which cores, instructions and memory this process may use: affinity, cgroups (both versions), /sys and /proc."""

import os
from dataclasses import dataclass
from pathlib import Path

from headwater.devices.cpu.arm_flags import IS_ARM, arm_flags

ROOT = Path("/")  # where /sys and /proc are


@dataclass(frozen=True, slots=True)
class Core:
    """A physical core: those of its logical CPUs (SMT siblings) that this process may use, and its NUMA node."""

    cpus: tuple[int, ...]
    node: int = 0
    capacity: int = 1024  # relative speed; 1024 where the cores do not differ


def usable_cpus() -> frozenset[int]:
    """The logical CPUs of this process's affinity mask; all CPUs where the system has no such masks."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores() -> tuple[Core, ...]:
    """The cores of the affinity mask, by node, the fast ones first. Each CPU is a core where /sys does not say more."""
    cpus, node_of = usable_cpus(), _nodes()
    siblings: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(cpus):
        listed = parse_cpu_list(_read(_cpu_file(cpu, "topology/thread_siblings_list")))
        siblings.setdefault(listed or (cpu,), []).append(cpu)
    cores = [
        Core(tuple(found), node_of.get(found[0], 0), _number(_read(_cpu_file(found[0], "cpu_capacity"))) or 1024)
        for found in siblings.values()
    ]
    return tuple(sorted(cores, key=lambda core: (core.node, -core.capacity, core.cpus)))


def num_usable_cores() -> int:
    """Physical cores of the affinity mask, cut by the cgroup's CPU quota and by OMP_NUM_THREADS."""
    num_cores = len(physical_cores())
    quota = cpu_quota()
    if quota is not None:
        # Rounded down: threads above the quota would be stopped together in the middle of a step.
        num_cores = min(num_cores, int(quota))
    wanted = wanted_threads()
    return max(1, num_cores if wanted is None else min(num_cores, wanted))


def wanted_threads() -> int | None:
    """OMP_NUM_THREADS, by which many people limit everything that they start."""
    return _number(os.environ.get("OMP_NUM_THREADS", "")) or None


def cpu_quota() -> float | None:
    """The CPUs that the cgroups allow, 2.5 for example. None: no limit."""
    quotas = []
    for folder in _cgroups("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quotas.append((_number(quota), _number(period)))
        quotas.append((_number(_read(folder / "cpu.cfs_quota_us")), _number(_read(folder / "cpu.cfs_period_us"))))
    return min((quota / period for quota, period in quotas if quota and period), default=None)


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions as the Linux kernel names them; empty where the system does not say."""
    if IS_ARM:
        return arm_flags()
    return next((frozenset(value.split()) for key, value in _cpu_info() if key == "flags"), frozenset())


def processor_name() -> str:
    """The processor's name in /proc/cpuinfo; empty where there is none, as on many Arm machines."""
    return next((value for key, value in _cpu_info() if key == "model name"), "")


def free_memory_bytes() -> int:
    """Memory that can be allocated without swapping, within the cgroups' limits."""
    lines = _read(ROOT / "proc/meminfo").splitlines()
    available = next((line for line in lines if line.startswith("MemAvailable:")), None)
    # macOS counts no such memory; half of all is a careful guess.
    free = int(available.split()[1]) * 1024 if available else _physical_memory_bytes() // 2
    for folder in _cgroups("memory"):
        limit, used = _memory_limit(folder), _memory_used(folder)
        if limit is not None and used is not None:
            free = min(free, limit - used)
    return max(0, free)


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_limit_bytes() -> int | None:
    """The smallest memory limit of the cgroups. None: no limit."""
    limits = [limit for folder in _cgroups("memory") if (limit := _memory_limit(folder)) is not None]
    return min(limits, default=None)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """`0-2,8` → (0, 1, 2, 8). Empty for what is no such list."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return ()
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def _nodes() -> dict[int, int]:
    """The NUMA node of each logical CPU."""
    folders = sorted((ROOT / "sys/devices/system/node").glob("node[0-9]*"))
    return {cpu: int(it.name[4:]) for it in folders for cpu in parse_cpu_list(_read(it / "cpulist"))}


def _cpu_file(cpu: int, name: str) -> Path:
    return ROOT / f"sys/devices/system/cpu/cpu{cpu}" / name


def _cgroups(controller: str) -> list[Path]:
    """The folders of the process's cgroup and those around it. A container sees its own at the top."""
    top = ROOT / "sys/fs/cgroup"
    folders = [top, top / controller]
    for line in _read(ROOT / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or controller in controllers.split(","):
            base = top if number == "0" else top / controller
            own = base / path.lstrip("/")
            folders += [it for it in (own, *own.parents) if it.is_relative_to(base)]
    return list(dict.fromkeys(folders))


def _memory_limit(folder: Path) -> int | None:
    limit = _number(_read(folder / "memory.max")) or _number(_read(folder / "memory.limit_in_bytes"))
    return limit if limit is not None and limit < 1 << 60 else None  # version 1 writes 2^63 for no limit


def _memory_used(folder: Path) -> int | None:
    """Without the file cache that the system drops when memory is wanted."""
    used = _number(_read(folder / "memory.current")) or _number(_read(folder / "memory.usage_in_bytes"))
    for line in _read(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file") and used is not None:
            return max(0, used - int(value))
    return used


def _cpu_info() -> list[tuple[str, str]]:
    lines = (line.partition(":") for line in _read(ROOT / "proc/cpuinfo").splitlines())
    return [(key.strip(), value.strip()) for key, _, value in lines]


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # not Linux, or not in a cgroup
        return ""
