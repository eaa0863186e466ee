#!/usr/bin/env python3
"""Measure one server with the workloads W1 to W4.

make bench                                       starts `headwater serve` with the default model
run.py --only W1,W2 --serve "--threads 2"        arguments for `headwater serve`
run.py --url http://127.0.0.1:8000 --model m     a server that is already up, ours or another one
"""

import argparse
import asyncio
import contextlib
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from headwater.bench.connection import HttpClient
from headwater.launch.config import ServerArgs
from headwater.launch.model_choice import with_model
from headwater.tokenization.tokenizer import Tokenizer
from load_client import Record, Target, measure
from results import save, table, without_paths
from server_process import ServerProcess
from workloads import WORKLOADS, Measurement, Prompts, measurements, warm_up

IGNORE_EOS = {"ignore_eos": True}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a server that is already up; otherwise `headwater serve` is started")
    parser.add_argument("--model", help="its model name (with --url)")
    parser.add_argument("--serve", default="", help="more arguments for `headwater serve`")
    parser.add_argument(
        "--tokenizer", help="of the model: folder or .gguf file; default: the default model's"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, separated by commas")
    parser.add_argument("--name", default="headwater", help="part of the result file's name")
    parser.add_argument("--no-save", action="store_true", help="print, but write no result file")
    options = parser.parse_args(argv)
    options.only = tuple(options.only.split(","))
    if wrong := set(options.only) - set(WORKLOADS):
        parser.error(f"--only must be some of {', '.join(WORKLOADS)}, got {', '.join(sorted(wrong))}")
    if options.url and not options.model:
        parser.error("--url needs --model")
    return options


def load_tokenizer(path: str | None) -> Tokenizer:
    """The tokenizer of `path`, or of the default model."""
    model = with_model(ServerArgs(model=path)).model
    assert model is not None
    return Tokenizer.load(model)


async def measure_and_print(
    http: HttpClient, server: ServerProcess | None, target: Target, measurement: Measurement
) -> Record:
    """`measure`, with the cores used by other processes if the benchmark started the server."""
    record: Record = {}
    with server.foreign_work(record) if server else contextlib.nullcontext():
        record |= await measure(http, target, measurement)
    shown = {name: round(value, 3) for name, value in record.items() if isinstance(value, int | float)}
    print(measurement.workload, shown, flush=True)
    return record


async def suite(
    target: Target, server: ServerProcess | None, prompts: Prompts, *, repeats: int, only: tuple[str, ...]
) -> list[Record]:
    records: list[Record] = []
    with contextlib.closing(HttpClient(target.url)) as http:
        for measurement in warm_up(prompts):
            await measure(http, target, measurement)
        for repeat in range(repeats):
            for measurement in measurements(prompts, repeat=repeat, only=only):
                record = await measure_and_print(http, server, target, measurement)
                records.append({**record, "repeat": repeat})
    return records


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    tokenizer = load_tokenizer(options.tokenizer)
    # a server would answer prompts of an earlier run from its cache
    prompts = Prompts(tokenizer, salt=secrets.token_hex(4) if options.url else "")
    facts: dict[str, object] = {}
    if options.url:
        target = Target(options.url.rstrip("/"), options.model, IGNORE_EOS)
        records = asyncio.run(suite(target, None, prompts, repeats=options.repeats, only=options.only))
    else:
        command = f"{sys.executable} -m headwater serve --port {{port}} --served-model-name m {options.serve}"
        with tempfile.TemporaryDirectory() as logs:
            server = ServerProcess(
                command, environment={}, model="m", extra=IGNORE_EOS, log=Path(logs) / "server.log"
            )
            try:
                server.wait_until_answering(limit_s=120)
                records = asyncio.run(
                    suite(server.target, server, prompts, repeats=options.repeats, only=options.only)
                )
            finally:
                server.stop()
        facts = server_facts(server)
    for record in records:
        record["server"] = options.name
    print(table(records, [options.name]))
    print(facts)
    if not options.no_save:
        print("written to", save(options.name, records, servers={options.name: facts}))


def server_facts(server: ServerProcess) -> dict[str, object]:
    return {
        "command": without_paths(server.argv),
        "first_answer_s": round(server.start_s, 2),
        "peak_rss_mib": round(server.peak_rss_mib),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
