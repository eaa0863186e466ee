"""`headwater serve`, from its arguments to its exit code."""

import asyncio
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from headwater.devices.cpu.thread_plan import plan_threads
from headwater.launch.config import ServerArgs
from headwater.launch.model_choice import with_model
from headwater.launch.private_directory import private_directory
from headwater.logs import configure_logging
from headwater.server.descriptors import raise_descriptor_limit
from headwater.server.exits import EXIT_INTERRUPTED, EXIT_REFUSED, print_error
from headwater.server.extras import check_extras
from headwater.server.signs_of_life import SignsOfLife
from headwater.server.supervisor import EngineSupervisor


def serve(args: ServerArgs) -> int:
    """Serve until Ctrl-C or SIGTERM, or until the last engine ends for good. Returns the exit code."""
    configure_logging(args.log_level, args.log_format)
    raise_descriptor_limit()  # before the engines start, since they inherit it
    try:
        check_extras(args)
        args = with_model(args)
        listener = open_port(args.host, args.port)
    except (ValueError, OSError) as error:
        print_error(str(error))
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    with listener, private_directory() as directory, SignsOfLife() as signs:
        return asyncio.run(run_server(args, listener=listener, directory=directory, on_ready=signs.stop))


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError` that names the address if it is not available."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; see --host and --port"
        ) from None
    return listener


async def run_server(
    args: ServerArgs, *, listener: socket.socket, directory: Path, on_ready: Callable[[], None]
) -> int:
    """Start the engine processes, then serve. Returns the exit code; all started processes have ended then."""
    stop_requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop_requested.set)
    plan = plan_threads(num_engines=args.dp_size * args.tp_size, threads=args.threads, pinning=args.pin_threads)
    supervisors = [
        EngineSupervisor(
            args.for_one_engine(ranks[0].num_threads),
            directory=directory,
            index=index,
            cpus=ranks[0].cpus,
            rank_cpus=tuple(rank.cpus for rank in ranks[1:]),
        )
        for index, ranks in enumerate(plan.grouped(args.tp_size))
    ]
    try:
        endpoints = [await supervisor.start() for supervisor in supervisors]
        # imported here: the engines load during the second that this import takes
        from headwater.server.api_process import ApiProcess

        api = ApiProcess(
            args,
            listener=listener,
            supervisors=supervisors,
            endpoints=endpoints,
            stop_requested=stop_requested,
            on_ready=on_ready,
            api_cpus=plan.api_cpus,
        )
        return await api.run()
    finally:
        await asyncio.gather(*(supervisor.stop(grace_s=1.0) for supervisor in supervisors))
