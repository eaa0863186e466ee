#!/usr/bin/env python3
"""The memory of a server's processes: after the start, prepared for grammars, after a grammar, with a full KV cache.

    memory.py [--save] [--serve "--threads 2"] [--no-fill]

RSS counts every page that a process has, so pages that processes share count in each of them; PSS shares them out.
The record has both, in MiB, and how long the first schema of the idle server took beside a plain request.
"""

import argparse
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from headwater.bench.machine import command_of, process_tree
from results import save, without_paths
from server_process import ServerProcess

NAMES = {"engine_process": "engine", "check_process": "grammars", "rank_process": "rank"}
IDLE_S = 6.0  # a server prepares for grammars after two seconds
PROMPT_TOKENS = 1500
LIMIT_S = 300.0
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    parser.add_argument("--serve", default="", help="more arguments for `headwater serve`")
    parser.add_argument("--no-fill", action="store_true", help="leave the KV cache as it is, which takes a minute less")
    options = parser.parse_args(argv)
    command = f"{sys.executable} -m headwater serve --port {{port}} --served-model-name m {options.serve}"
    with tempfile.TemporaryDirectory() as logs:
        server = ServerProcess(command, environment={}, model="m", extra={}, log=Path(logs) / "server.log")
        try:
            server.wait_until_answering(LIMIT_S)
            records = measure(server, fills=not options.no_fill)
        finally:
            server.stop()
    if options.save:
        print("written to", save("memory", records, servers={"headwater": {"command": without_paths(server.argv)}}))


def measure(server: ServerProcess, *, fills: bool) -> list[dict]:
    records: list[dict] = []

    def look(stage: str, **facts: float) -> None:
        memory = {role: sizes_mib(pid) for pid in process_tree(server.pid) if (role := role_of(pid))}
        rss, pss = (sum(sizes[kind] for sizes in memory.values()) for kind in ("rss", "pss"))
        records.append({"stage": stage, "rss": round(rss, 1), "pss": round(pss, 1), "processes": memory, **facts})
        parts = ", ".join(f"{name} {sizes['rss']:.0f}/{sizes['pss']:.0f}" for name, sizes in memory.items())
        print(f"{stage}: RSS {rss:.0f}, PSS {pss:.0f} MiB ({parts})", facts or "", flush=True)

    look("started")
    time.sleep(IDLE_S)
    look("prepared for grammars")
    with httpx.Client(base_url=server.target.url, timeout=LIMIT_S, trust_env=False) as http:
        plain_s = timed(http)
        first_s = timed(http, json_schema=SCHEMA)
        fresh_s = timed(http, json_schema={**SCHEMA, "title": "another"})
        look("after two grammars", plain_s=plain_s, first_schema_s=first_s, fresh_schema_s=fresh_s)
        if fills:
            fill(http)
            look("full KV cache")
    print(f"largest sum of RSS on the way: {server.peak_rss_mib:.0f} MiB")
    records.append({"stage": "peak", "rss": round(server.peak_rss_mib, 1)})
    return records


def timed(http: httpx.Client, **params: object) -> float:
    """Seconds until the first token of a short request."""
    body = {"text": f"{secrets.token_hex(4)}: a cat as JSON", "sampling_params": {"max_new_tokens": 1, **params}}
    began_s = time.perf_counter()
    http.post("/generate", json=body).raise_for_status()
    return round(time.perf_counter() - began_s, 4)


def fill(http: httpx.Client) -> None:
    """Send new prompts until every page of the device was used."""
    info = http.get("/server_info").raise_for_status().json()
    for number in range(int(info["max_total_num_tokens"] // PROMPT_TOKENS + 2)):
        ids = [(number * 7919 + 31 * place) % 40_000 + 100 for place in range(PROMPT_TOKENS)]
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
        http.post("/generate", json=body).raise_for_status()


def role_of(pid: int) -> str:
    """What a process of the server does; empty if it is gone."""
    command = command_of(pid)
    if not command:
        return ""
    return next((role for name, role in NAMES.items() if any(it.endswith(name) for it in command)), "api")


def sizes_mib(pid: int) -> dict[str, float]:
    """RSS, PSS and unshared memory."""
    sizes = {"rss": 0.0, "pss": 0.0, "private": 0.0}
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return sizes
    for line in lines:
        name, _, rest = line.partition(":")
        for kind in sizes:
            if name.lower().split("_")[0] == kind:
                sizes[kind] += 0.0 if name.startswith("Pss_") else int(rest.split()[0]) / 1024
    return {kind: round(size, 1) for kind, size in sizes.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
