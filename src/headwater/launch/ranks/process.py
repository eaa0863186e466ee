"""A rank process: `python -m headwater.launch.ranks.process`, started by its engine only.

It reads a `RankStart` from standard input, whose end means that the engine has died. Reports go to standard output, all
other output to standard error.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from io import FileIO

import msgspec

from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.segment import RankSegment
from headwater.devices.rank_group import RankGroup
from headwater.launch.child_process import (
    EXIT_CRASHED,
    EXIT_REFUSED,
    die_with_parent,
    exit_with_parent,
    take_standard_output,
)
from headwater.launch.placement import flags_in_errors, open_placement
from headwater.launch.ranks.start import RankStart, num_pages_of, page_share, shared_pages
from headwater.launch.served_model import read_model, serve_model
from headwater.logs import configure_logging
from headwater.messages.frames import read_frame
from headwater.ranks import orders
from headwater.ranks.plan_codec import Kind
from headwater.ranks.plan_stream import StreamReader
from headwater.ranks.shared_memory import SharedMemory
from headwater.ranks.step_progress import StepProgress
from headwater.ranks.worker import Meetings, RankWorker, Reports

_SIGN_EVERY_S = 0.25

log = logging.getLogger(__name__)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    reports = Reports(take_standard_output().write)
    stdin = FileIO(0, closefd=False)
    start = msgspec.msgpack.decode(read_frame(stdin), type=RankStart)
    exit_with_parent(stdin)
    if start.parent_pid is not None:
        die_with_parent(start.parent_pid)
    configure_logging(start.args.log_level, start.args.log_format, prefix=f"rank {start.rank}")
    stream = start.stream
    memory = SharedMemory(stream.memory_fd, stream.num_bytes)
    reader = StreamReader(memory, stream.wake_fd, index=stream.index, num_readers=stream.num_readers)
    life = _SignsOfLife(reader)
    try:
        worker = _build(start, reader, reports)
    except (ValueError, OSError) as error:  # mistakes of the user, which rank 0 has found as well or will not
        log.debug("the rank could not start", exc_info=True)
        reports.send(orders.Refused(message=str(error)))
        return EXIT_REFUSED
    if worker is None:
        return EXIT_CRASHED
    life.steps = worker.progress
    gc.collect()
    gc.freeze()  # what is there now lives as long as the process: no collection needs to look at it
    worker.run(reader)
    if start.gpus is not None:
        os._exit(0)  # the driver frees what the rank had; NCCL would wait for the others
    return 0


def _build(start: RankStart, reader: StreamReader, reports: Reports) -> RankWorker | None:
    """Load this rank's share, and build the runner that the engine orders; None if the engine ends first."""
    args = start.args
    group, meetings = _join(start)
    placement = open_placement(args, cpus=start.cpus, ranks=group)
    model = read_model(args, placement, start.weights)
    loaded = model.loaded
    share, num_pages = page_share(args, loaded), None
    if start.gpus is not None:
        max_context = loaded.config.max_context
        num_pages = num_pages_of(args, placement, loaded, share=share, max_context=max_context)
    reports.send(orders.Loaded(weights_id=loaded.weights_id, weights_bytes=loaded.weights_bytes, num_pages=num_pages))
    record = reader.take()
    if record is None or record.kind != Kind.ORDER:
        return None
    order = orders.decode_order(record.body.data)
    if not isinstance(order, orders.BuildRunner):
        return None
    as_rank_0 = replace(loaded, weights_bytes=order.weights_bytes)
    with flags_in_errors():
        runner = placement.make_runner(
            args, as_rank_0, layout=share.own, num_pages=order.num_pages, max_context=order.max_context
        )
    copier = None
    if order.num_host_pages:
        shared = shared_pages(start.host_fd, share, order.num_host_pages)
        _, copier = placement.make_host_memory(runner, num_pages=order.num_host_pages, shared=shared)
    worker = RankWorker(
        serve_model(args, placement.device, model, runner),
        meetings=meetings,
        copier=copier,
        reports=reports,
        capture_graphs=lambda: placement.capture_graphs(runner),
    )
    reports.send(orders.Ready())
    return worker


def _join(start: RankStart) -> tuple[RankGroup, Meetings]:
    """Meet the other ranks."""
    if start.gpus is None:
        ranks = CpuRanks(RankSegment(start.segment_fd), rank=start.rank)  # no limit: its engine watches all ranks
        return ranks, ranks
    from headwater.launch.ranks.gpu_group import RankMeetings, join_group

    gpus, size = start.gpus, start.args.tp_size
    group = join_group(rank=start.rank, size=size, first_card=gpus.first_card, rendezvous=gpus.rendezvous)
    return group, RankMeetings(start.rank)


class _SignsOfLife:
    """A thread that shows the engine that this process runs, and how far its steps are."""

    def __init__(self, reader: StreamReader) -> None:
        self.steps = StepProgress()
        self._reader = reader
        threading.Thread(target=self._run, name="show-life", daemon=True).start()

    def _run(self) -> None:
        shown = self.steps.look()
        while True:
            with contextlib.suppress(RuntimeError):  # the GPU has failed, which the next step reports
                shown = self.steps.look()
            self._reader.show_life(shown)
            time.sleep(_SIGN_EVERY_S)


if __name__ == "__main__":
    sys.exit(main())
