"""The other ranks of an engine: how many there may be, their processes, and what they share with rank 0."""

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.page_share import PageShare, SharedPages
from headwater.devices.cpu.ranks.segment import RankSegment, rank_buffer_bytes
from headwater.devices.cpu.topology import num_usable_cores
from headwater.execution.runner import Runner
from headwater.launch.config import ServerArgs
from headwater.launch.placement import Copier, Placement, kv_dtype, num_kv_pages
from headwater.launch.served_model import ServedModel
from headwater.models.config import ModelConfig
from headwater.models.loader import LoadedModel, read_config, resolve_model
from headwater.models.ranks.share import check_tp_size
from headwater.ranks import orders
from headwater.ranks.copier import RanksCopier
from headwater.ranks.processes import RankProcesses, StreamFds
from headwater.ranks.runner import RanksLauncher, RanksRunner
from headwater.ranks.shared_memory import SharedMemory, nameless_file
from headwater.ranks.worker import Meetings

if TYPE_CHECKING:  # it imports PyTorch
    from headwater.devices.cuda.ranks.group import CudaRanks
    from headwater.launch.ranks.gpu_group import EngineMeetings

RANK_COMMAND = (sys.executable, "-m", "headwater.launch.ranks.process")


class GpuStart(msgspec.Struct, frozen=True):
    """Where ranks on GPUs meet: rank r takes card `first_card` + r."""

    first_card: int
    rendezvous: str  # a file that does not exist yet


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank process reads from its standard input. Descriptors are inherited."""

    args: ServerArgs
    rank: int
    stream: StreamFds
    segment_fd: int  # where ranks on a CPU meet; -1 on GPUs
    gpus: GpuStart | None  # None on a CPU
    host_fd: int  # the host tier's pages
    parent_pid: int | None  # to die with; None: started by a thread that may end before its process
    weights: tuple[str, str] | None
    cpus: tuple[tuple[int, ...], ...]


class Ranks:
    """Rank 0's side of its group: the group itself and the processes of the others."""

    def __init__(
        self,
        args: ServerArgs,
        *,
        weights: tuple[str, str] | None,
        cpus: Sequence[tuple[tuple[int, ...], ...]],
        gpus: tuple[int, ...] = (),
        last_words: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start the processes, which begin to load. `args` have the defaults of the device; `gpus`: of each rank.

        `last_words` gets the reason if the whole process must end by force, which only happens on GPUs.
        """
        assert args.model is not None
        config = read_config(resolve_model(args.model))
        check_tp_size(config, args.tp_size)
        self._num_ranks = args.tp_size
        self._last_words = last_words
        self._resources = ExitStack()
        self.num_pages: int | None = None  # the fewest that a rank can hold, where each has memory of its own
        self._weights_bytes = 0
        self._gpu_meetings: EngineMeetings | None = None
        self._runner: Runner | None = None  # rank 0's
        try:
            self._host_fd = nameless_file()
            self._resources.callback(os.close, self._host_fd)
            is_main = threading.current_thread() is threading.main_thread()
            meeting = self._rendezvous(gpus[0]) if gpus else None
            segment = _segment(args, config) if meeting is None else None
            segment_fd = -1 if segment is None else segment.descriptor

            def start_of(rank: int, stream: StreamFds) -> RankStart:
                return RankStart(
                    args=args,
                    rank=rank,
                    stream=stream,
                    segment_fd=segment_fd,
                    gpus=meeting,
                    host_fd=self._host_fd,
                    parent_pid=os.getpid() if is_main else None,
                    weights=weights,
                    cpus=cpus[rank - 1] if cpus else (),
                )

            def start_processes(abort: Callable[[int], None]) -> RankProcesses:
                return RankProcesses(
                    command=RANK_COMMAND,
                    make_start=start_of,
                    num_ranks=args.tp_size,
                    largest_command=8 * config.max_context + (1 << 20),
                    inherited_fds=(self._host_fd,) if segment is None else (segment.descriptor, self._host_fd),
                    limit_s=args.rank_timeout,
                    abort=abort,
                )

            self.group: CpuRanks | CudaRanks
            self._meetings: Meetings
            if segment is not None:
                self._resources.callback(segment.close)
                self._meetings = self.group = CpuRanks(segment, rank=0, limit_s=args.rank_timeout)
                self.processes = start_processes(self.group.abort)
            elif meeting is not None:
                self._start_on_gpus(meeting, start_processes)
        except BaseException:
            self._resources.close()
            raise

    def _rendezvous(self, first_card: int) -> GpuStart:
        """Where the ranks of an engine meet."""
        folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="headwater-ranks-"))
        return GpuStart(first_card, str(Path(folder) / "rendezvous"))

    def _start_on_gpus(self, gpus: GpuStart, start_processes: Callable[[Callable[[int], None]], RankProcesses]) -> None:
        """Start the processes and wait until all have met."""
        from headwater.launch.ranks.gpu_group import EngineMeetings, close_group, end_hard, join_group

        def clean(rank: int) -> None:
            self._last_words(str(self.processes.lost or f"rank {rank} failed in a step, which ends all ranks on GPUs"))
            _remove(gpus.rendezvous)

        meetings = EngineMeetings(end=lambda rank: end_hard(self.processes.pids, lambda: clean(rank)))
        self.processes = start_processes(meetings.abort)
        self._resources.callback(self.processes.close)
        group = join_group(rank=0, size=self._num_ranks, first_card=gpus.first_card, rendezvous=gpus.rendezvous)

        def leave() -> None:
            if meetings.close():
                if self._runner is not None:
                    self._runner.replace_kv(None)  # and its CUDA graphs, which NCCL would wait for
                close_group(group)

        self._resources.callback(leave)
        meetings.may_hang = False
        self._meetings, self.group, self._gpu_meetings = meetings, group, meetings

    def wait_until_loaded(self, loaded: LoadedModel) -> None:
        """Wait until all have loaded the weights that rank 0 has."""
        for rank, report in enumerate(self.processes.wait_for_all(orders.Loaded), start=1):
            assert isinstance(report, orders.Loaded)
            if report.weights_id != loaded.weights_id:
                raise ValueError(f"rank {rank} has loaded other weights than rank 0: the files changed meanwhile")
            self._weights_bytes += report.weights_bytes
            if report.num_pages is not None:
                self.num_pages = min(self.num_pages or report.num_pages, report.num_pages)

    def build_runners(self, loaded: LoadedModel, *, num_pages: int, max_context: int, num_host_pages: int) -> None:
        """Let the others build their runners."""
        self.processes.order(
            orders.BuildRunner(
                num_pages=num_pages,
                max_context=max_context,
                num_host_pages=num_host_pages,
                weights_bytes=loaded.weights_bytes,
            )
        )

    def start_steps(self, runner: Runner) -> RanksLauncher:
        """Wait until all can compute."""
        self._runner = runner
        self.processes.wait_for_all(orders.Ready)
        if self._gpu_meetings is not None:
            self._gpu_meetings.may_hang = True
            self.processes.check()  # a rank that was lost before has not ended the engine
        return RanksLauncher(runner, processes=self.processes, meetings=self._meetings)

    def begin_capture(self) -> None:
        """Let the others capture their CUDA graphs, as rank 0 does next: the steps before a capture meet."""
        self.processes.order(orders.CaptureGraphs())

    def serve(self, own: ServedModel) -> RanksRunner:
        self.processes.watch_steps(self.group.num_arrived if isinstance(self.group, CpuRanks) else lambda rank: 0)
        return RanksRunner(own, processes=self.processes, meetings=self._meetings)

    def share_host_memory(self, share: PageShare, num_pages: int) -> SharedPages:
        return shared_pages(self._host_fd, share, num_pages)

    def over_all(self, copier: Copier) -> RanksCopier:
        """Copies of rank 0's copier, on all ranks."""
        return RanksCopier(copier, self.processes)

    def memory_bytes(self, own: dict[str, int]) -> dict[str, int]:
        """Of all ranks: weights may be cut unevenly, pages are not."""
        return {**own, "weights": own["weights"] + self._weights_bytes, "kv_cache": own["kv_cache"] * self._num_ranks}

    def close(self) -> None:
        """End the processes. Repeated calls do nothing."""
        if self._gpu_meetings is not None:
            self._gpu_meetings.close()
        self.processes.close()
        self._resources.close()


def _segment(args: ServerArgs, config: ModelConfig) -> RankSegment:
    """Where ranks on a CPU meet."""
    assert args.max_running_requests is not None and args.max_step_tokens is not None
    buffer_bytes = rank_buffer_bytes(
        size=args.tp_size,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_step_tokens=args.max_step_tokens,
    )
    return RankSegment.create(size=args.tp_size, buffer_bytes=buffer_bytes, num_slots=args.max_running_requests)


def _remove(rendezvous: str) -> None:
    """The file and its folder, without waiting for the objects that use them."""
    with contextlib.suppress(OSError):
        shutil.rmtree(Path(rendezvous).parent)


def start_ranks(
    args: ServerArgs,
    *,
    weights: tuple[str, str] | None,
    cpus: Sequence[tuple[tuple[int, ...], ...]],
    gpus: tuple[int, ...] = (),
    last_words: Callable[[str], None] = lambda _: None,
) -> tuple[ServerArgs, Ranks | None]:
    """The other ranks that the arguments ask for, None for none, and the arguments of each rank.

    `gpus`: of each rank; none on a CPU. `last_words`: see `Ranks`. ValueError that names the flag if this model or
    machine cannot be shared so.
    """
    if args.tp_size == 1:
        return args, None
    if gpus:
        args = args.for_device("cuda")
    else:
        threads = args.threads or max(1, num_usable_cores() // args.tp_size)
        args = msgspec.structs.replace(args.for_device("cpu"), threads=threads)
    return args, Ranks(args, weights=weights, cpus=cpus, gpus=gpus, last_words=last_words)


def page_share(args: ServerArgs, loaded: LoadedModel) -> PageShare:
    """What a rank holds of each page."""
    size, dtype = args.page_size, kv_dtype(args)
    return PageShare.of(
        loaded.whole_kv_layout(page_size=size, dtype=dtype),
        loaded.kv_layout(page_size=size, dtype=dtype),
        heads=loaded.kv_heads,
        rank=loaded.share.rank,
        num_ranks=loaded.share.size,
    )


def shared_pages(host_fd: int, share: PageShare, num_pages: int) -> SharedPages:
    """The host tier's memory, mapped in this process."""
    memory = SharedMemory(os.dup(host_fd), num_pages * share.whole.page_bytes)
    return SharedPages(memory.buffer, share)


def num_pages_of(
    args: ServerArgs, placement: Placement, loaded: LoadedModel, *, share: PageShare, max_context: int
) -> int:
    """As many pages of KV as the arguments and the memory of this rank allow.

    The ranks of a CPU share one memory. Each rank on a GPU has its own, where its part of every page lies; sizes that
    the arguments name are those of whole pages.
    """
    is_of_rank = placement.device.name == "cuda" and args.max_total_tokens is None and args.kv_cache_memory_mb is None
    return num_kv_pages(
        args,
        share.own if is_of_rank else share.whole,
        max_context=max_context,
        weights_bytes=loaded.weights_bytes * (1 if is_of_rank else loaded.share.size),
        free_bytes=placement.device.free_memory_bytes(),
        reserved_bytes=placement.workspace_bytes(args, loaded.config),
    )
