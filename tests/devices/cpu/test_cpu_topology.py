"""Cores, quotas and memory of the process, read from fake /sys and /proc trees."""

import os

import pytest

from fake_machine import FakeMachine
from headwater.devices.cpu import topology
from headwater.devices.cpu.topology import (
    cpu_flags,
    cpu_quota,
    free_memory_bytes,
    memory_limit_bytes,
    num_usable_cores,
    parse_cpu_list,
    physical_cores,
    processor_name,
)


def test_smt_siblings_are_one_core(machine: FakeMachine) -> None:
    """Two threads on one core share its arithmetic units: they win nothing, and the API process finds no CPU."""
    machine.has_cores(4, num_siblings=2)
    assert [core.cpus for core in physical_cores()] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert num_usable_cores() == 4


def test_affinity_counts_not_the_machine(machine: FakeMachine) -> None:
    machine.has_cores(4, num_siblings=2)
    machine.allows({1, 5, 6})
    assert [core.cpus for core in physical_cores()] == [(1, 5), (6,)]
    assert num_usable_cores() == 2


def test_cores_are_sorted_by_node_and_the_fast_ones_come_first(machine: FakeMachine) -> None:
    """Of a phone's or a laptop's unequal cores, few threads take the fast ones."""
    machine.has_cores(4, num_nodes=2)
    machine.write("sys/devices/system/cpu/cpu0/cpu_capacity", "400")
    assert [(core.node, core.cpus) for core in physical_cores()] == [(0, (1,)), (0, (0,)), (1, (2,)), (1, (3,))]


def test_without_sys_each_cpu_is_a_core(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and old containers: nothing is read, nothing fails."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(topology, "IS_ARM", False)  # Arm's flags do not come from files
    assert [core.cpus for core in physical_cores()] == [(0,), (1,), (2,)]
    assert num_usable_cores() == 3
    assert (cpu_quota(), memory_limit_bytes()) == (None, None)
    assert free_memory_bytes() > 0  # 0 would be no KV cache
    assert (cpu_flags(), processor_name()) == (frozenset(), "")


@pytest.mark.parametrize(
    ("text", "num_cores"),
    [("max 100000", 8), ("250000 100000", 2), ("400000 100000", 4), ("50000 100000", 1), ("", 8), ("junk", 8)],
)
def test_a_cpu_quota_limits_the_threads(machine: FakeMachine, text: str, num_cores: int) -> None:
    """With two and a half CPUs of quota, three busy threads would be stopped together for a sixth of the time."""
    machine.has_cores(8)
    machine.write("sys/fs/cgroup/cpu.max", text)
    assert num_usable_cores() == num_cores


def test_the_tightest_cgroup_around_the_process_counts(machine: FakeMachine) -> None:
    """A service's own group has no limit; the slice around it has."""
    machine.has_cores(8)
    machine.write("proc/self/cgroup", "0::/user.slice/headwater.service")
    machine.write("sys/fs/cgroup/user.slice/headwater.service/cpu.max", "max 100000")
    machine.write("sys/fs/cgroup/user.slice/cpu.max", "150000 50000")
    machine.write("sys/fs/cgroup/other.slice/cpu.max", "50000 50000")
    assert cpu_quota() == 3.0


def test_version_1_of_cgroups(machine: FakeMachine) -> None:
    machine.has_cores(8)
    machine.write("proc/self/cgroup", "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a")
    machine.write("sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us", "150000")
    machine.write("sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us", "100000")
    machine.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    machine.write("sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes", "9000")
    machine.write("sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes", "3000")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    machine.write("proc/meminfo", "MemAvailable: 1000 kB")
    assert cpu_quota() == 1.5
    assert memory_limit_bytes() == 9000
    assert free_memory_bytes() == 6000


def test_the_usual_variable_limits_the_threads(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """People who share a machine set it for everything that they start."""
    machine.has_cores(8)
    for text, expected in (("3", 3), ("64", 8), ("0", 8), ("junk", 8), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert num_usable_cores() == expected


def test_free_memory_respects_the_cgroup(machine: FakeMachine) -> None:
    """MemAvailable is the machine's; a container is killed at its own limit. Its file cache can be dropped."""
    machine.write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 100 kB")
    assert free_memory_bytes() == 100 * 1024
    machine.write("sys/fs/cgroup/memory.max", "max")
    machine.write("sys/fs/cgroup/memory.current", "1000")
    assert free_memory_bytes() == 100 * 1024
    machine.write("sys/fs/cgroup/memory.max", "5000")
    assert free_memory_bytes() == 4000
    machine.write("sys/fs/cgroup/memory.stat", "anon 100\ninactive_file 900\nfile 950")
    assert free_memory_bytes() == 4900
    machine.write("sys/fs/cgroup/memory.current", "7000")
    assert free_memory_bytes() == 0


def test_the_processor_and_its_flags(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "IS_ARM", False)
    machine.write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU 3\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n")
    assert processor_name() == "Some CPU 3"
    assert cpu_flags() == {"fpu", "avx2"}


def test_lists_of_cpus() -> None:
    assert parse_cpu_list("0-2,8") == (0, 1, 2, 8)
    assert parse_cpu_list("5") == (5,)
    assert parse_cpu_list("") == parse_cpu_list("a-b") == ()


def test_this_machine_can_be_read() -> None:
    cores = physical_cores()
    assert 1 <= num_usable_cores() <= len(cores)
    assert {cpu for core in cores for cpu in core.cpus} == topology.usable_cpus()
