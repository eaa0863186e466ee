"""The other ranks of an engine: how many there may be, their processes, and what they share with rank 0."""

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.page_share import PageShare, SharedPages
from headwater.devices.cpu.ranks.segment import RankSegment, rank_buffer_bytes
from headwater.devices.cpu.topology import num_usable_cores
from headwater.devices.cuda.driver import has_gpu
from headwater.execution.runner import Runner
from headwater.launch.config import ServerArgs
from headwater.launch.placement import Copier, kv_dtype
from headwater.launch.served_model import ServedModel
from headwater.models.loader import LoadedModel, read_config, resolve_model
from headwater.models.ranks.share import check_tp_size
from headwater.ranks import orders
from headwater.ranks.copier import RanksCopier
from headwater.ranks.processes import RankProcesses, StreamFds
from headwater.ranks.runner import RanksLauncher, RanksRunner
from headwater.ranks.shared_memory import SharedMemory, nameless_file

RANK_COMMAND = (sys.executable, "-m", "headwater.launch.ranks.process")


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank process reads from its standard input. Descriptors are inherited."""

    args: ServerArgs
    rank: int
    stream: StreamFds
    segment_fd: int  # where ranks meet
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
    ) -> None:
        """Start the processes, which begin to load. `args` have the device's defaults."""
        assert args.model is not None and args.max_running_requests is not None and args.max_step_tokens is not None
        config = read_config(resolve_model(args.model))
        check_tp_size(config, args.tp_size)
        self._num_ranks = args.tp_size
        self._resources = ExitStack()
        try:
            buffer_bytes = rank_buffer_bytes(
                size=args.tp_size,
                hidden_size=config.hidden_size,
                vocab_size=config.vocab_size,
                max_step_tokens=args.max_step_tokens,
            )
            segment = RankSegment.create(
                size=args.tp_size, buffer_bytes=buffer_bytes, num_slots=args.max_running_requests
            )
            self._resources.callback(segment.close)
            self.group = CpuRanks(segment, rank=0, limit_s=args.rank_timeout)
            self._host_fd = nameless_file()
            self._resources.callback(os.close, self._host_fd)
            is_main = threading.current_thread() is threading.main_thread()

            def start_of(rank: int, stream: StreamFds) -> RankStart:
                return RankStart(
                    args=args,
                    rank=rank,
                    stream=stream,
                    segment_fd=segment.descriptor,
                    host_fd=self._host_fd,
                    parent_pid=os.getpid() if is_main else None,
                    weights=weights,
                    cpus=cpus[rank - 1] if cpus else (),
                )

            self.processes = RankProcesses(
                command=RANK_COMMAND,
                make_start=start_of,
                num_ranks=args.tp_size,
                largest_command=8 * config.max_context + (1 << 20),
                inherited_fds=(segment.descriptor, self._host_fd),
                limit_s=args.rank_timeout,
                abort=self.group.abort,
            )
        except BaseException:
            self._resources.close()
            raise
        self._weights_bytes = 0

    def build_runners(self, loaded: LoadedModel, *, num_pages: int, max_context: int, num_host_pages: int) -> None:
        """Wait until all have loaded the weights that rank 0 has, and let them build their runners."""
        for rank, report in enumerate(self.processes.wait_for_all(orders.Loaded), start=1):
            assert isinstance(report, orders.Loaded)
            if report.weights_id != loaded.weights_id:
                raise ValueError(f"rank {rank} has loaded other weights than rank 0: the files changed meanwhile")
            self._weights_bytes += report.weights_bytes
        self.processes.order(
            orders.BuildRunner(num_pages=num_pages, max_context=max_context, num_host_pages=num_host_pages)
        )

    def start_steps(self, runner: Runner) -> RanksLauncher:
        """Wait until all can compute."""
        self.processes.wait_for_all(orders.Ready)
        return RanksLauncher(runner, processes=self.processes, meetings=self.group)

    def serve(self, own: ServedModel) -> RanksRunner:
        return RanksRunner(own, processes=self.processes, meetings=self.group)

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
        self.processes.close()
        self._resources.close()


def start_ranks(
    args: ServerArgs, *, weights: tuple[str, str] | None, cpus: Sequence[tuple[tuple[int, ...], ...]]
) -> tuple[ServerArgs, Ranks | None]:
    """The other ranks that the arguments ask for, None for none, and the arguments of each rank.

    ValueError that names the flag if this model or machine cannot be shared so.
    """
    if args.tp_size == 1:
        return args, None
    if args.device == "cuda" or (args.device == "auto" and has_gpu()):
        raise ValueError(f"--tp-size {args.tp_size} needs --device cpu: ranks on GPUs are not supported yet")
    threads = args.threads or max(1, num_usable_cores() // args.tp_size)
    args = msgspec.structs.replace(args.for_device("cpu"), threads=threads)
    return args, Ranks(args, weights=weights, cpus=cpus)


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
