"""The machine as far as the process may use it: processor, threads, memory, GPU, disk, port."""

import importlib.util
import platform
import shutil
import socket
from pathlib import Path

from headwater.devices.cpu.thread_plan import Pinning, plan_threads
from headwater.devices.cpu.topology import (
    cpu_quota,
    free_memory_bytes,
    memory_limit_bytes,
    num_usable_cores,
    physical_cores,
    processor_name,
    usable_cpus,
    wanted_threads,
)
from headwater.devices.cuda.driver import has_driver
from headwater.doctor.finding import Finding, Level

_GIB = 1 << 30
_ASKED_S = 1.0
_LEAST_FREE_BYTES = 1 << 30  # what a server of the default model takes, and some room
_LEAST_DISK_BYTES = 500 << 20  # the default model, its packed weights and the kernels


def processor(pinning: Pinning = "auto") -> Finding:
    """Cores, threads, limits, and what the server would do with them."""
    cores, cpus, quota = physical_cores(), usable_cpus(), cpu_quota()
    engine = plan_threads(pinning=pinning).engines[0]
    nodes = {core.node for core in cores}
    parts = [processor_name() or platform.machine(), _count(len(cores), "core"), _count(len(cpus), "thread")]
    if len(nodes) > 1:
        parts.append(f"{len(nodes)} NUMA nodes")
    if quota is not None:
        parts.append(f"cgroup quota {quota:g} CPUs")
    if wanted_threads() is not None:
        parts.append(f"OMP_NUM_THREADS={wanted_threads()}")
    pinned = "pinned" if engine.cpus else "not pinned"
    return Finding(
        "processor",
        f"{', '.join(parts)}; computes on {_count(engine.num_threads, 'thread')}, {pinned}",
        facts={
            "name": processor_name(),
            "machine": platform.machine(),
            "cores": len(cores),
            "threads": len(cpus),
            "numa_nodes": len(nodes),
            "cgroup_quota": quota,
            "usable_cores": num_usable_cores(),
            "num_threads": engine.num_threads,
            "pinned_cpus": [list(each) for each in engine.cpus],
        },
    )


def memory() -> Finding:
    free, limit = free_memory_bytes(), memory_limit_bytes()
    limited = "" if limit is None else f", cgroup limit {limit / _GIB:.1f} GiB"
    facts = {"free_bytes": free, "cgroup_limit_bytes": limit}
    if free == 0:
        return Finding("memory", "unknown on this system", facts=facts)
    text = f"{free / _GIB:.1f} GiB free{limited}"
    if free < _LEAST_FREE_BYTES:
        remedy = "end other programs, raise the limit, or serve with a smaller --kv-cache-memory-mb"
        return Finding("memory", f"{text}: little for a server", Level.PROBLEM, remedy, facts)
    return Finding("memory", text, facts=facts)


def gpu() -> Finding:
    """Whether `serve` would compute on a GPU. Imports no PyTorch."""
    has_torch, has_triton = (importlib.util.find_spec(name) is not None for name in ("torch", "triton"))
    facts = {"driver": has_driver(), "torch": has_torch, "triton": has_triton}
    if not has_driver():
        return Finding("gpu", "no NVIDIA driver: computes on the CPU", facts=facts)
    missing = [name for name, is_there in (("torch", has_torch), ("triton", has_triton)) if not is_there]
    if missing:
        remedy = "pip install 'headwater[gpu]' (in a clone: GPU=1 make setup) to compute on the GPU"
        text = f"NVIDIA's driver is installed, {' and '.join(missing)} not: computes on the CPU"
        return Finding("gpu", text, Level.NOTE, remedy, facts)
    return Finding("gpu", f"NVIDIA's driver ({_num_gpus()}) and PyTorch are installed", facts=facts)


def disk(folder: Path) -> Finding:
    """Space where models and compiled kernels are kept."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    facts = {"folder": str(folder), "free_bytes": free}
    text = f"{free / _GIB:,.1f} GiB free for {folder}"
    if free < _LEAST_DISK_BYTES:
        return Finding("disk", text, Level.PROBLEM, "free some space, or set HEADWATER_CACHE to another disk", facts)
    return Finding("disk", text, facts=facts)


def port(number: int) -> Finding:
    """Whether a server could listen there."""
    facts = {"port": number}
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
            probe.listen(1)
        except OSError as error:
            text = f"{number}: {error.strerror or error}"
            if answers_http(number):
                text += "; a server answers there"
            return Finding("port", text, Level.NOTE, "end what runs there, or take another --port", facts)
    return Finding("port", f"{number} is free", facts=facts)


def answers_http(number: int) -> bool:
    """Whether an HTTP server answers on this port of this machine."""
    try:
        with socket.create_connection(("127.0.0.1", number), timeout=_ASKED_S) as peer:
            peer.sendall(b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
            return peer.recv(5) == b"HTTP/"
    except OSError:
        return False


def _num_gpus() -> str:
    return _count(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))), "GPU")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
