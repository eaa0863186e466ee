"""Meetings of ranks in shared memory, by the kernels and in numpy: sums are right, and no wait is for ever."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from program_steps import step_of

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import KernelLibrary, kernel_library
from headwater.devices.cpu.program import Array, Program
from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.segment import RankSegment
from headwater.devices.host_tensor import HostTensor
from headwater.devices.rank_group import RankFailed

SIZE = 3
WIDTH = 37
MOST_TOKENS = 24
WAIT_S = 60.0


class Ranks:
    """The ranks of a test, each a thread with its own copy of the kernels: a copy has its own pool of threads."""

    def __init__(self, segment: RankSegment, libraries: list[KernelLibrary | None]) -> None:
        self.groups = [CpuRanks(segment, rank=rank, limit_s=WAIT_S) for rank in range(SIZE)]
        self.devices = [CpuDevice(num_threads=2, use_kernels=False, ranks=group) for group in self.groups]
        for device, library in zip(self.devices, libraries, strict=True):
            device._library = library

    def run(self, compute: Callable[[int], object]) -> list[object]:
        """`compute(rank)` on all ranks at once; what each returns, or raises."""

        def attempt(rank: int) -> object:
            try:
                return compute(rank)
            except RankFailed as error:
                return error

        with ThreadPoolExecutor(SIZE) as pool:
            return list(pool.map(attempt, range(SIZE)))


@pytest.fixture(params=[True, False], ids=["kernels", "numpy"])
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ranks]:
    libraries: list[KernelLibrary | None] = [None] * SIZE
    if request.param:
        library = kernel_library()
        if library is None:
            pytest.skip("no C compiler")
        copies = [tmp_path / f"{rank}-{library.path.name}" for rank in range(SIZE)]
        libraries = [KernelLibrary(Path(shutil.copy(library.path, copy)), library.isa) for copy in copies]
    segment = RankSegment.create(size=SIZE, buffer_bytes=MOST_TOKENS * SIZE * WIDTH * 4, num_slots=4)
    yield Ranks(segment, libraries)
    segment.close()


def _values(rank: int, number: int) -> np.ndarray:
    """What a rank gives to every third meeting, of MOST_TOKENS rows. Rounded sums of them depend on the order."""
    return np.random.default_rng((rank, number % 3)).standard_normal((MOST_TOKENS, WIDTH)).astype(np.float32)


def _summed(device: CpuDevice, rank: int, *, times: int) -> tuple[Program, Array]:
    """A program that adds the sum over ranks to a residual, again and again."""
    program = device.start_program()
    layers = [device.pack_linear([HostTensor.of(_values(rank, number))]) for number in range(3)]
    residual = device.all_reduce(layers[0].embed(program.token_ids))
    for number in range(1, times + 1):
        device.add_reduced(residual, layers[number % 3].embed(program.token_ids))
    return program, program.keep(residual)


def _in_order(number: int) -> np.ndarray:
    total = _values(0, number)
    for rank in range(1, SIZE):
        total += _values(rank, number)
    return total


def test_every_rank_has_the_sum_in_the_order_of_the_ranks(ranks: Ranks) -> None:
    """Ranks whose numbers differ in one bit would sample different tokens one day.

    Two hundred meetings in each of several steps of different sizes, and a rank that is late in some: a buffer that is
    written while another rank still reads it gives a wrong sum.
    """
    programs = [_summed(device, rank, times=200) for rank, device in enumerate(ranks.devices)]
    sums = [_in_order(number) for number in range(3)]
    expected = sums[0]
    for number in range(1, 201):
        expected = expected + sums[number % 3]

    def compute(rank: int) -> list[np.ndarray]:
        program, residual = programs[rank]
        found = []
        for number, num_tokens in enumerate((MOST_TOKENS, 1, 5)):
            if number == rank:
                time.sleep(0.02)
            step = step_of(num_tokens)
            program.run(step)
            found.append(program.view(residual, step).copy())
        return found

    for found in ranks.run(compute):
        assert isinstance(found, list), found
        for numbers in found:
            np.testing.assert_array_equal(numbers, expected[: len(numbers)])


def test_a_rank_that_is_ahead_leaves_what_others_still_read(ranks: Ranks) -> None:
    """Two ranks write their parts of the next sum before the third has read this one."""
    programs = [_summed(device, rank, times=1) for rank, device in enumerate(ranks.devices)]
    step = step_of(5)
    kernels = [op.kernel for op in programs[0][0].ops]
    assert kernels == ["embed", "publish", "meet", "add_ranks"] * 2
    ranks.run(lambda rank: programs[rank][0].run(step, end=3))
    for program, _ in programs[:2]:
        program.run(step, first=3, end=6)
    program, residual = programs[2]
    program.run(step, first=3, end=4)
    np.testing.assert_array_equal(program.view(residual, step), _in_order(0)[:5])


def test_a_rank_that_does_not_come_is_named_and_a_reset_group_computes_again(ranks: Ranks) -> None:
    """A stopped process looks like this. The others must not wait any longer than their limit, nor for each other."""
    programs = [_summed(device, rank, times=1) for rank, device in enumerate(ranks.devices)]
    ranks.groups[0].limit_s = 2.0  # rank 1 is a thread, which a busy machine may hold up for a while
    step = step_of(3)
    found = ranks.run(lambda rank: None if rank == 2 else programs[rank][0].run(step))
    assert [type(it) for it in found] == [RankFailed, RankFailed, type(None)]
    assert str(found[0]) == "rank 2 did not answer within 2 s" and "rank 2" in str(found[1])
    for group in ranks.groups:
        assert group.is_aborted
    late = ranks.run(lambda rank: programs[rank][0].run(step))
    assert all(isinstance(it, RankFailed) and it.rank == 2 for it in late), "no step is computed with wrong numbers"
    for group in ranks.groups:
        group.reset()
    ranks.groups[0].limit_s = None
    assert ranks.run(lambda rank: programs[rank][0].run(step)) == [None] * SIZE
    for program, residual in programs:
        np.testing.assert_array_equal(program.view(residual, step), (_in_order(0) + _in_order(1))[:3])


def test_a_rank_that_has_ended_is_noticed_without_a_limit(ranks: Ranks) -> None:
    """Its process has ended and nobody has waited for it: signals still reach it."""
    programs = [_summed(device, rank, times=0) for rank, device in enumerate(ranks.devices)]
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        for group in ranks.groups:
            group.limit_s = None
            group._pids[1] = process.pid
        found = ranks.run(lambda rank: None if rank == 1 else programs[rank][0].run(step_of(2)))
    assert "rank 1 has ended" in {str(it) for it in found}
    assert all(it is None or (isinstance(it, RankFailed) and it.rank == 1) for it in found)


def test_any_thread_can_give_a_rank_up(ranks: Ranks) -> None:
    """Who notices that a rank is lost does not wait in a meeting himself."""
    programs = [_summed(device, rank, times=0) for rank, device in enumerate(ranks.devices)]
    threading.Timer(0.1, ranks.groups[0].abort, args=(1,)).start()
    found = ranks.run(lambda rank: None if rank == 1 else programs[rank][0].run(step_of(2)))
    assert [str(it) for it in found] == ["rank 1 computes no more", "None", "rank 1 computes no more"]


def test_a_step_that_does_not_fit_is_refused(ranks: Ranks) -> None:
    """It must not write beyond the buffer, into that of the meeting before."""
    programs = [_summed(device, rank, times=0) for rank, device in enumerate(ranks.devices)]
    found = ranks.run(lambda rank: programs[rank][0].run(step_of(2 * MOST_TOKENS)))
    assert all(isinstance(it, RankFailed) for it in found)
    assert any("does not fit" in str(it) for it in found)


def test_tokens_of_a_step_are_awaited_before_the_next(ranks: Ranks) -> None:
    first, second = ranks.groups[:2]
    second.end_step()  # its part is computed; rank 0 has not sampled yet
    second.limit_s = 0.05
    with pytest.raises(RankFailed, match="rank 0 did not answer"):
        second.begin_step()
    for group in ranks.groups:
        group.reset()
    second.end_step()
    first.newest_tokens[:] = 17
    first.end_step()
    second.begin_step()
    assert second.newest_tokens.tolist() == [17] * 4


def test_a_descriptor_that_is_no_segment_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "other").open("w+b") as file:
        file.write(bytes(4096))
        file.flush()
        with pytest.raises(ValueError, match="no segment of ranks"):
            RankSegment(file.fileno())
