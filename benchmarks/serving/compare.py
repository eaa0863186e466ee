#!/usr/bin/env python3
"""Measure `headwater serve` and other OpenAI-compatible servers in turns, and print a column for each.

All servers stay up; those that are not being measured are stopped (SIGSTOP), so that they take no time from
the others, and the order changes with every repeat. So all see the same hour of the same machine.

    compare.py --servers servers.toml --serve "--threads 2" --only W1,W2,W3,W4 --repeats 5

The file names the other servers, which you install, each in an environment of its own. They must serve the
same weights under the name `m`. `{port}` stands for the port, `{headwater}` for this Headwater:

    [llama-q4]
    command = "llama-server -m smollm2-q4_1.gguf --host 127.0.0.1 --port {port} -t 2 -np 16 -c 40960"
    [vllm-bf16]
    command = "vllm serve smollm2 --served-model-name m --port {port} --max-model-len 2048"
    path = "/path/to/venv/bin"                     # put first in PATH
    environment = {VLLM_CPU_OMP_THREADS_BIND = "0-1"}
    start_limit_s = 600                            # until the first answer
    only = ["W1", "W2"]                            # workloads; without it, those of --only
    [headwater-bf16]
    command = "{headwater} serve --model smollm2 --served-model-name m --port {port}"
"""

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from headwater.bench.connection import HttpClient
from load_client import Record, measure
from results import save, table
from run import IGNORE_EOS, load_tokenizer, measure_and_print, server_facts
from server_process import ServerProcess
from workloads import WORKLOADS, Prompts, measurements, warm_up

OURS = "headwater"


class Peer(NamedTuple):
    """A server to measure."""

    command: str
    path: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012
    start_limit_s: float = 600.0
    only: tuple[str, ...] = WORKLOADS


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=Path, required=True, help="TOML file that names the other servers")
    parser.add_argument("--serve", default="", help="more arguments for `headwater serve`")
    parser.add_argument(
        "--tokenizer", help="of the model: folder or .gguf file; default: the default model's"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only",
        default=",".join(WORKLOADS),
        help="workloads, or the beginning of measurements' names (W3_warm needs W3_first), separated by commas",
    )
    parser.add_argument("--name", default="peers", help="part of the result file's name")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--no-save", action="store_true", help="print, but write no result file")
    options = parser.parse_args(argv)
    options.only = tuple(options.only.split(","))
    return options


def read_peers(file: Path, *, serve: str) -> dict[str, Peer]:
    """Our server and those that `file` names. Raises `TypeError` for a key that does not exist."""
    ours = f"{{headwater}} serve --port {{port}} --served-model-name m {serve}"
    peers = {OURS: Peer(ours)} | {name: Peer(**entry) for name, entry in tomllib.loads(file.read_text()).items()}
    return {name: peer._replace(only=tuple(peer.only)) for name, peer in peers.items()}


def start_servers(peers: dict[str, Peer], logs: Path) -> dict[str, ServerProcess]:
    """Start the servers, one after the other, so that no start affects another's start-up time."""
    servers: dict[str, ServerProcess] = {}
    try:
        for name, peer in peers.items():
            environment = dict(peer.environment)
            if peer.path:
                environment["PATH"] = peer.path + os.pathsep + os.environ["PATH"]
            server = ServerProcess(
                peer.command.replace("{headwater}", f"{sys.executable} -m headwater"),
                environment=environment,
                model="m",
                extra=IGNORE_EOS,
                log=logs / f"{name}.log",
            )
            servers[name] = server
            server.wait_until_answering(peer.start_limit_s)
            print(f"{name}: first answer after {server.start_s:.1f} s", flush=True)
            server.pause()
    except BaseException:
        stop(servers)
        raise
    return servers


async def take_turns(
    servers: dict[str, ServerProcess],
    prompts: Prompts,
    *,
    repeats: int,
    only: dict[str, tuple[str, ...]],
) -> list[Record]:
    """Run every measurement on one server after another. The others are paused meanwhile.

    `only` holds each server's workloads.
    """
    records: list[Record] = []
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            name: stack.enter_context(contextlib.closing(HttpClient(server.target.url)))
            for name, server in servers.items()
        }
        for name, server in servers.items():
            server.resume()
            for measurement in warm_up(prompts):
                await measure(clients[name], server.target, measurement)
            server.pause()
        for repeat in range(repeats):
            order = list(servers) if repeat % 2 == 0 else list(reversed(servers))
            for measurement in measurements(prompts, repeat=repeat, only=WORKLOADS):
                for name in order:
                    if not measurement.workload.startswith(only[name]):
                        continue
                    server = servers[name]
                    server.resume()
                    print(f"{name}: ", end="")
                    record = await measure_and_print(clients[name], server, server.target, measurement)
                    server.pause()
                    records.append({"server": name, "repeat": repeat, **record})
    return records


def stop(servers: dict[str, ServerProcess]) -> None:
    for server in servers.values():
        server.stop()


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    prompts = Prompts(load_tokenizer(options.tokenizer))
    with tempfile.TemporaryDirectory() as temporary:
        logs = options.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        peers = read_peers(options.servers, serve=options.serve)
        only = {
            name: tuple(w for w in options.only if w.startswith(peer.only)) for name, peer in peers.items()
        }
        servers = start_servers(peers, logs)
        try:
            records = asyncio.run(take_turns(servers, prompts, repeats=options.repeats, only=only))
        finally:
            stop(servers)
    facts = {name: server_facts(server) for name, server in servers.items()}
    print(table(records, list(servers)))
    for name, fact in facts.items():
        print(f"{name}: first answer after {fact['first_answer_s']} s, peak RSS {fact['peak_rss_mib']} MiB")
    if not options.no_save:
        print("written to", save(f"{OURS}-{options.name}", records, servers=facts))


if __name__ == "__main__":
    main(sys.argv[1:])
