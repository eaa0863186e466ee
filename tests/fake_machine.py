"""Fake /sys and /proc trees: cores with SMT siblings, NUMA nodes, cgroups of both versions."""

import os
from pathlib import Path

import pytest

from headwater.devices.cpu import topology


class FakeMachine:
    """What topology.py reads: `num_cores` cores of `num_siblings` CPUs, spread over the nodes.

    As on PCs, CPU i and CPU i + num_cores are the siblings of core i.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(topology, "ROOT", root)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def has_cores(self, num_cores: int, *, num_siblings: int = 1, num_nodes: int = 1) -> None:
        self.allows(set(range(num_cores * num_siblings)))
        per_node = num_cores // num_nodes
        nodes: dict[int, list[int]] = {}
        for core in range(num_cores):
            cpus = [core + num_cores * sibling for sibling in range(num_siblings)]
            nodes.setdefault(core // per_node, []).extend(cpus)
            for cpu in cpus:
                self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", ",".join(map(str, cpus)))
        for node, cpus in nodes.items():
            self.write(f"sys/devices/system/node/node{node}/cpulist", ",".join(map(str, cpus)))

    def allows(self, cpus: set[int]) -> None:
        """Set the affinity mask."""
        self._monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus, raising=False)
        self._monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
