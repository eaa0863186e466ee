"""Which threads compute where: the cores of each engine, and the CPUs that are left to the API process."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headwater.devices.cpu.topology import Core, num_usable_cores, physical_cores

Pinning = Literal["auto", "on", "off"]

# On fewer cores, a thread that shares its core with another process has nowhere to go.
_LEAST_CORES_TO_PIN = 4
# Without SMT siblings, the API process gets a core of its own once that is a small part of the machine.
_LEAST_CORES_FOR_API = 8


@dataclass(frozen=True, slots=True)
class EngineThreads:
    """The computing threads of one engine. `cpus[i]`: where thread i may run; empty: the threads are not pinned."""

    num_threads: int
    cpus: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """The threads of all engines, and the CPUs of the API process (empty: any)."""

    engines: tuple[EngineThreads, ...]
    api_cpus: tuple[int, ...] = ()

    def grouped(self, num_ranks: int) -> list[tuple[EngineThreads, ...]]:
        """The threads by engine, where each engine is `num_ranks` processes that were planned one by one."""
        return [self.engines[first : first + num_ranks] for first in range(0, len(self.engines), num_ranks)]


def plan_threads(*, num_engines: int = 1, threads: int | None = None, pinning: Pinning = "auto") -> ThreadPlan:
    """Share the cores that this process may use among its engines. `threads`: of each engine, if the user chose.

    Engines get different cores, and each engine cores of one NUMA node where that is possible. auto: threads are pinned
    where there are four cores or more, and all of them compute. With fewer threads than cores, the other cores are
    another's, and another server would pin its threads to the same cores. Without SMT siblings, auto lets a thread move
    among its engine's cores: kept on one, it would wait while others have that core.
    """
    cores, num_usable = physical_cores(), num_usable_cores()
    is_whole = threads is None and num_usable == len(cores) and num_engines <= len(cores)
    pins = pinning == "on" or (pinning == "auto" and is_whole and len(cores) >= _LEAST_CORES_TO_PIN)
    if not pins or not hasattr(os, "sched_setaffinity"):
        each = threads or max(1, num_usable // num_engines)
        return ThreadPlan((EngineThreads(each),) * num_engines)
    has_siblings = all(len(core.cpus) > 1 for core in cores)
    if is_whole and not has_siblings and len(cores) >= _LEAST_CORES_FOR_API:
        num_usable -= 1
    each = threads or max(1, num_usable // num_engines)
    parts = _disjoint(cores, [each] * num_engines)
    may_move = pinning == "auto" and not has_siblings
    engines = tuple(EngineThreads(each, _cpus_of_threads(part, may_move=may_move)) for part in parts)
    return ThreadPlan(engines, _left_over(cores, parts))


def _cpus_of_threads(cores: Sequence[Core], *, may_move: bool) -> tuple[tuple[int, ...], ...]:
    every = tuple(sorted(cpu for core in cores for cpu in core.cpus))
    return tuple(every if may_move else core.cpus for core in cores)


def _disjoint(cores: Sequence[Core], sizes: Iterable[int]) -> list[list[Core]]:
    """Cores for each engine: of one node if it has as many free, else of the fewest nodes. Too few: none are pinned."""
    free = {node: [core for core in cores if core.node == node] for node in sorted({core.node for core in cores})}
    parts = []
    for size in sizes:
        fitting = [node for node in free if len(free[node]) >= size]
        # the fullest node that fits keeps the others whole for the next engines
        order = sorted(fitting, key=lambda node: len(free[node]))[:1] or sorted(free, key=lambda node: -len(free[node]))
        part: list[Core] = []
        for node in order:
            taken = free[node][: size - len(part)]
            del free[node][: len(taken)]
            part += taken
        parts.append(part if len(part) == size else [])
    return parts


def _left_over(cores: Sequence[Core], parts: Sequence[Sequence[Core]]) -> tuple[int, ...]:
    """Whole cores on which nothing computes; else the second CPUs of all cores; else none.

    None as well if an engine is not pinned: restarted by the API process, it would be left with that process's CPUs.
    """
    if not all(parts):
        return ()
    computing = {core for part in parts for core in part}
    whole = [cpu for core in cores if core not in computing for cpu in core.cpus]
    return tuple(sorted(whole or (cpu for core in cores for cpu in core.cpus[1:])))


def confine_process(cpus: Iterable[int]) -> None:
    """Move every thread of this process to `cpus`. Does nothing if that is impossible."""
    wanted = set(cpus)
    if not wanted or not hasattr(os, "sched_setaffinity"):
        return
    for task in Path("/proc/self/task").glob("[0-9]*"):
        with suppress(OSError):  # the thread has ended, or the system has taken a CPU away
            os.sched_setaffinity(int(task.name), wanted)
