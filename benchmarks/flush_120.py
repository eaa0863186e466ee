#!/usr/bin/env python3
"""120 turns of a rollout loop: twice per turn a prompt of about 2,200 tokens and, directly after it, `/flush_cache`.

The first flush of a turn has `timeout=10`, the second one has no timeout. These promises must hold:

* every flush with `timeout=10` is answered with 200;
* a flush without a timeout that is refused names its blockers;
* after a successful flush, the next prompt finds nothing in the cache.

flush_120.py                                                  starts `headwater serve` with the default model
flush_120.py --serve "--enable-hierarchical-cache"            with more arguments for it
flush_120.py --tiers device,host,storage --serve "..."        every flush covers these tiers; a store needs its own
flush_120.py --url http://127.0.0.1:30000                     a server that is already up
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).resolve().parent / "serving"))
from results import save, without_paths
from server_process import ServerProcess

NUM_TURNS = 120
PROMPT_TOKENS = 2200
OUTPUT_TOKENS = 4
TIMEOUT_S = 10.0
Record = dict[str, Any]


def run(
    http: httpx.Client,
    *,
    vocab_size: int,
    num_turns: int = NUM_TURNS,
    prompt_tokens: int = PROMPT_TOKENS,
    tiers: str = "",
) -> list[Record]:
    """Run all turns against one server; return a record for each flush of `tiers` (default: the server's default).

    The prompts are the same in every run.
    """
    tokens = random.Random(120)
    shared = [tokens.randrange(3, vocab_size) for _ in range(prompt_tokens // 2)]  # the beginning of every prompt
    records: list[Record] = []
    for turn in range(num_turns):
        for timeout_s in (TIMEOUT_S, None):
            prompt = shared + [tokens.randrange(3, vocab_size) for _ in range(prompt_tokens - len(shared))]
            record = one_prompt_and_flush(http, prompt, timeout_s, tiers)
            records.append({"turn": turn, "timeout_s": timeout_s} | record)
    return records


def one_prompt_and_flush(http: httpx.Client, prompt: list[int], timeout_s: float | None, tiers: str = "") -> Record:
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    started_s = time.perf_counter()
    answer = http.post("/generate", json={"input_ids": prompt, "sampling_params": sampling})
    answer.raise_for_status()
    answered_s = time.perf_counter()
    query = ({} if timeout_s is None else {"timeout": timeout_s}) | ({"tiers": tiers} if tiers else {})
    flush = http.post("/flush_cache", params=query, headers={"accept": "application/json"})
    flushed_s = time.perf_counter()
    facts = flush.json()
    return {
        "generate_s": answered_s - started_s,
        "cached_tokens": answer.json()["meta_info"]["cached_tokens"],
        "flush_s": flushed_s - answered_s,
        "status": flush.status_code,
        "waited_s": facts.get("waited_s"),
        "freed_pages": {tier: amount["pages"] for tier, amount in facts.get("freed", {}).items()},
        "blockers": facts.get("blockers", {}),
    }


def summary(records: Sequence[Record]) -> Record:
    """The violations of the three promises, which must all be 0, and the times."""
    waited = [record for record in records if record["timeout_s"] is not None]
    at_once = [record for record in records if record["timeout_s"] is None]
    refused = [record for record in at_once if record["status"] != 200]
    after_flush = [record for before, record in pairwise(records) if before["status"] == 200]  # not after a refusal
    flush_ms = [record["flush_s"] * 1000 for record in records]
    return {
        "num_flushes": len(records),
        "not_200_with_timeout": sum(record["status"] != 200 for record in waited),
        "refused_without_blockers": sum(not record["blockers"] for record in refused),
        "cached_tokens_after_flush": sum(record["cached_tokens"] for record in [records[0], *after_flush]),
        "refused_without_timeout": len(refused),
        "flush_p50_ms": round(statistics.median(flush_ms), 2),
        "flush_max_ms": round(max(flush_ms), 2),
        "generate_p50_s": round(statistics.median(record["generate_s"] for record in records), 3),
    }


def holds(facts: Record) -> bool:
    """Whether all three promises were kept."""
    promises = ("not_200_with_timeout", "refused_without_blockers", "cached_tokens_after_flush")
    return all(facts[name] == 0 for name in promises)


def measure(url: str, tiers: str) -> list[Record]:
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as http:
        vocab_size = http.get("/model_info").raise_for_status().json()["vocab_size"]
        http.post("/flush_cache", params={"timeout": TIMEOUT_S}).raise_for_status()
        return run(http, vocab_size=vocab_size, tiers=tiers)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that is already up; otherwise `headwater serve` is started")
    parser.add_argument("--serve", default="", help="more arguments for `headwater serve`")
    parser.add_argument("--tiers", default="", help="tiers that every flush covers, for example device,host,storage")
    parser.add_argument("--name", default="flush-120", help="part of the result file's name")
    parser.add_argument("--no-save", action="store_true", help="print, but write no result file")
    options = parser.parse_args(argv)
    servers: dict[str, Any] = {}
    if options.url:
        records = measure(options.url, options.tiers)
    else:
        command = f"{sys.executable} -m headwater serve --port {{port}} --served-model-name m {options.serve}"
        with tempfile.TemporaryDirectory() as logs:
            server = ServerProcess(command, environment={}, model="m", extra={}, log=Path(logs) / "server.log")
            try:
                server.wait_until_answering(limit_s=120)
                records = measure(server.target.url, options.tiers)
            finally:
                server.stop()
        servers = {"headwater": {"command": without_paths(server.argv)}}
    facts = summary(records)
    print(facts)
    if not options.no_save:
        print("written to", save(options.name, [{"summary": facts}, *records], servers=servers))
    return 0 if holds(facts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
