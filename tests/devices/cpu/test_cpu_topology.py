"""Cores and memory of this process, from files that a test can write."""

import os
from pathlib import Path

import pytest

from headwater.devices.cpu import topology as cpu_topology


def test_a_cpu_quota_limits_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container with two CPUs of quota on 64 cores, 64 threads would be throttled most of the time."""
    quota = tmp_path / "cpu.max"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_topology, "_CGROUP_CPU_MAX", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpu_topology.num_usable_cores() == 8
    for text, expected in (("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("", 8), ("junk", 8)):
        quota.write_text(text)
        assert cpu_topology.num_usable_cores() == expected


def test_the_usual_variable_limits_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who shares a machine sets it for everything that he starts."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cpu_topology, "_CGROUP_CPU_MAX", Path("/nowhere"))
    for text, expected in (("3", 3), ("64", 8), ("0", 8), ("junk", 8), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert cpu_topology.num_usable_cores() == expected


def test_affinity_counts_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert cpu_topology.num_usable_cores() == 1


def test_free_memory_respects_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MemAvailable is the machine's; a container is killed at its own limit."""
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(cpu_topology, "_CGROUP_MEMORY_MAX", limit)
    monkeypatch.setattr(cpu_topology, "_CGROUP_MEMORY_CURRENT", used)
    machine = cpu_topology.free_memory_bytes()
    assert machine > 0
    limit.write_text("max")
    used.write_text("1000")
    assert cpu_topology.free_memory_bytes() == pytest.approx(machine, rel=0.2)
    limit.write_text("5000")
    assert cpu_topology.free_memory_bytes() == 4000
    used.write_text("6000")
    assert cpu_topology.free_memory_bytes() == 0
