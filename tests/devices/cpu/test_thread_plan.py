"""Which threads are pinned where, on fake machines; and that a pinned pool computes on its cores on this one."""

import os
import subprocess
import sys

import pytest

from fake_machine import FakeMachine
from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.thread_plan import ThreadPlan, confine_process, plan_threads

is_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's affinity masks")


def cores_of(plan: ThreadPlan) -> list[list[int]]:
    """The first CPU of each thread's core, by engine."""
    return [[cpus[0] for cpus in engine.cpus] for engine in plan.engines]


def test_one_thread_for_each_core_and_the_siblings_for_the_api_process(machine: FakeMachine) -> None:
    machine.has_cores(4, num_siblings=2)
    plan = plan_threads()
    assert plan.engines[0].num_threads == 4
    assert plan.engines[0].cpus == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert plan.api_cpus == (4, 5, 6, 7)


def test_without_siblings_many_cores_spare_one_for_the_api_process(machine: FakeMachine) -> None:
    machine.has_cores(8)
    plan = plan_threads()
    assert plan.engines[0].cpus == (tuple(range(7)),) * 7, "a thread whose core others take moves to another one"
    assert plan.api_cpus == (7,)
    assert cores_of(plan_threads(pinning="on")) == [[0, 1, 2, 3, 4, 5, 6]]


def test_without_siblings_few_cores_all_compute(machine: FakeMachine) -> None:
    machine.has_cores(4)
    plan = plan_threads()
    assert plan.engines[0].cpus == ((0, 1, 2, 3),) * 4
    assert plan.api_cpus == (), "any"


@pytest.mark.parametrize("num_cores", [1, 2, 3])
def test_few_cores_are_not_pinned_unless_asked_for(machine: FakeMachine, num_cores: int) -> None:
    machine.has_cores(num_cores)
    assert cores_of(plan_threads()) == [[]]
    assert plan_threads().engines[0].num_threads == num_cores
    assert cores_of(plan_threads(pinning="on")) == [list(range(num_cores))]


@pytest.mark.parametrize("reason", ["--threads", "quota", "OMP_NUM_THREADS", "off"])
def test_a_part_of_the_cores_is_not_pinned(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """Ten containers with two CPUs of quota each would all compute on the machine's first two cores."""
    machine.has_cores(16)
    if reason == "quota":
        machine.write("sys/fs/cgroup/cpu.max", "200000 100000")
    if reason == "OMP_NUM_THREADS":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    plan = plan_threads(threads=2 if reason == "--threads" else None, pinning="off" if reason == "off" else "auto")
    assert cores_of(plan) == [[]]
    assert plan.engines[0].num_threads == (16 if reason == "off" else 2)
    assert plan.api_cpus == ()


def test_engines_get_different_cores_of_one_node_each(machine: FakeMachine) -> None:
    machine.has_cores(8, num_siblings=2, num_nodes=2)
    assert cores_of(plan_threads(num_engines=2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    plan = plan_threads(num_engines=3, threads=2, pinning="on")
    assert cores_of(plan) == [[0, 1], [2, 3], [4, 5]]
    assert plan.api_cpus == (6, 7, 14, 15), "whole cores where nothing computes"


def test_an_engine_that_fits_a_node_does_not_straddle_two(machine: FakeMachine) -> None:
    """Half of its reads would cross the link between the sockets."""
    machine.has_cores(8, num_nodes=2)
    assert cores_of(plan_threads(num_engines=2, threads=3, pinning="on")) == [[0, 1, 2], [4, 5, 6]]
    assert cores_of(plan_threads(threads=6, pinning="on")) == [[0, 1, 2, 3, 4, 5]], "no node has six"


def test_more_threads_than_cores_are_not_pinned(machine: FakeMachine) -> None:
    machine.has_cores(4)
    plan = plan_threads(num_engines=2, threads=3, pinning="on")
    assert cores_of(plan) == [[0, 1, 2], []]
    assert [engine.num_threads for engine in plan.engines] == [3, 3]
    assert plan.api_cpus == (), "an engine that it restarts may use all"
    assert plan_threads(num_engines=6).engines[5].num_threads == 1


def test_no_pinning_where_the_system_has_none(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has_cores(8)
    monkeypatch.delattr(os, "sched_setaffinity")
    assert cores_of(plan_threads(pinning="on")) == [[]]
    confine_process([0])


@is_linux
@pytest.mark.slow
def test_pinned_threads_run_on_their_cores_and_the_caller_is_freed_again(library: KernelLibrary) -> None:
    """A caller that stays bound to one core would hand this down to every thread that it starts later.

    In a process of its own: the threads of this one's pool may run already.
    """
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS\n"
        "from headwater.devices.cpu.kernel_library import KernelLibrary\n"
        "from headwater.devices.cpu.machine_speed import measure_read_gb_s\n"
        "library = KernelLibrary(Path(sys.argv[1]), INSTRUCTION_SETS[sys.argv[2]])\n"
        "before, cpu = os.sched_getaffinity(0), max(os.sched_getaffinity(0))\n"
        "library.pin_threads([[min(before)], [cpu]])\n"
        "old = set(os.listdir('/proc/self/task'))\n"
        "measure_read_gb_s(library, [np.ones(1 << 20, np.uint8)], num_threads=2, limit_s=0.01)\n"
        "assert os.sched_getaffinity(0) == before\n"
        "(worker,) = set(os.listdir('/proc/self/task')) - old\n"
        "while os.sched_getaffinity(int(worker)) != {cpu}: time.sleep(0.01)\n"  # it pins itself, when its turn comes
    )
    subprocess.run([sys.executable, "-c", code, str(library.path), library.isa.name], check=True, timeout=100)


@is_linux
def test_all_threads_of_a_process_move() -> None:
    """Those of the tokenizer and of zmq exist before the banner, and stayed on the compute cores."""
    code = (
        "import os, threading\n"
        "from headwater.devices.cpu.thread_plan import confine_process\n"
        "cpu = max(os.sched_getaffinity(0))\n"
        "stop = threading.Event()\n"
        "threads = [threading.Thread(target=stop.wait) for _ in range(3)]\n"
        "for thread in threads: thread.start()\n"
        "confine_process([])\n"
        "confine_process([10_000])\n"
        "assert os.sched_getaffinity(0) != {10_000}\n"
        "confine_process([cpu])\n"
        "masks = [os.sched_getaffinity(int(task)) for task in os.listdir('/proc/self/task')]\n"
        "stop.set()\n"
        "assert len(masks) >= 4 and all(mask == {cpu} for mask in masks), masks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_ranks_of_an_engine_are_neighbours_with_cores_of_their_own(machine: FakeMachine) -> None:
    """Two engines of two ranks on four cores: no two ranks compute on one core."""
    machine.has_cores(4, num_siblings=2)
    engines = plan_threads(num_engines=4).grouped(2)
    assert [[rank.cpus for rank in ranks] for ranks in engines] == [[((0, 4),), ((1, 5),)], [((2, 6),), ((3, 7),)]]
