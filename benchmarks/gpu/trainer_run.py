#!/usr/bin/env python3
"""Weights from a trainer on a GPU, and sleep and wake, against one server: each part prints a line of JSON.

trainer_run.py OUT.json --shape llama3.1-8b                        one card: sleep, handles of CUDA (ipc, ipc-flat)
trainer_run.py OUT.json --shape llama3.1-8b --parts nccl,vllm      the trainer on the second card

A part that fails prints its error, and the next one runs. `sleep` releases and resumes memory for --sleeps rounds, with
tags by turns. It shows what all processes take of the card while the server sleeps and after it woke, and whether the
model computes the same after each wake. The other parts are those of serving/weights_transfer.py.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))

import httpx
import torch
from served import Served, serve
from shapes import make_model

from bare_transport import device_to_device_gb_per_s
from weights_transfer import (
    KEY,
    LIMITS,
    URL,
    distance,
    make_weights,
    measure,
    post,
    scores_of,
)

TAGS: list[list[str]] = [
    ["kv_cache", "weights", "cuda_graph"], ["kv_cache"], ["weights"], ["kv_cache", "weights"], ["cuda_graph"], [],
]  # fmt: skip
MIB = 1 << 20


def taken_mib() -> int:
    """What all processes take of the card, as the driver knows it."""
    free, total = torch.cuda.mem_get_info(0)
    return (total - free) // MIB


async def sleep_and_wake(num_rounds: int, limit_s: float) -> dict[str, Any]:
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, trust_env=False, limits=LIMITS) as http:
        scores, rounds = await scores_of(http), []
        weights_id = (await http.get(f"{URL}/server_info")).json()["internal_states"][0]["weights_id"]
        began_s = time.perf_counter()
        awake = taken_mib()
        for number in range(num_rounds):
            if time.perf_counter() - began_s > limit_s:
                break
            tags = TAGS[number % len(TAGS)]
            at_s = time.perf_counter()
            released = await post(http, "/release_memory_occupation", json={"tags": tags, "timeout": 10})
            slept_s = time.perf_counter()
            asleep = taken_mib()
            resumed = await post(http, "/resume_memory_occupation", json={"tags": tags})
            resumed_s = time.perf_counter()
            off_by = distance(await scores_of(http), scores)
            woke_s = time.perf_counter()
            rounds.append(
                {
                    "tags": tags,
                    "released": released["released"],
                    "asleep_mib": asleep,
                    "awake_mib": taken_mib(),
                    "off_by": round(off_by, 4),  # of log-probabilities; other weights are off by 1 or more
                    "is_right": off_by < 0.1 and resumed.get("weights_id", weights_id) == weights_id,
                    "release_s": round(slept_s - at_s, 3),
                    "resume_s": round(resumed_s - slept_s, 3),
                    "first_text_s": round(woke_s - resumed_s, 3),
                }
            )
            print(json.dumps({"round": number} | rounds[-1]), flush=True)
    whole = [each for each in rounds if {"kv_cache", "weights"} <= set(each["released"])]
    return {
        "num_rounds": len(rounds),
        "num_right": sum(each["is_right"] for each in rounds),
        "awake_mib_before": awake,
        "awake_mib": [rounds[0]["awake_mib"], rounds[len(rounds) // 2]["awake_mib"], rounds[-1]["awake_mib"]],
        "asleep_mib": sorted({each["asleep_mib"] for each in whole}),
        "resume_s": statistics.median(each["resume_s"] for each in whole),
        "first_text_s": statistics.median(each["first_text_s"] for each in whole),
    }


def run_part(part: str, options: argparse.Namespace, folder: Path, server: Served) -> dict[str, Any]:
    if part.startswith("sleep"):
        num_rounds = options.sleeps if part == "sleep" else 3
        return asyncio.run(sleep_and_wake(num_rounds, options.sleep_limit_s))
    device = f"cuda:{torch.cuda.device_count() - 1}" if part in ("nccl", "vllm") else "cuda:0"
    sets = [make_weights(folder, seed=seed, device=device) for seed in (1, 2)]
    found = asyncio.run(measure(part, sets, options, server))
    return found | {"device_to_device_gb_per_s": round(device_to_device_gb_per_s(1 << 30), 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama3.1-8b", help="a shape of shapes.py")
    parser.add_argument("--parts", default="sleep,ipc-flat,ipc,sleep-after", help="of sleep, ipc, ipc-flat, nccl, vllm")
    parser.add_argument("--sleeps", type=int, default=50)
    parser.add_argument("--sleep-limit-s", type=float, default=90.0)
    parser.add_argument("--rounds", type=int, default=3, help="updates of each way")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument(
        "--server-options", default="--mem-fraction-static 0.35 --max-running-requests 128 --cuda-graph-max-bs 72"
    )
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.shape, Path(root))
        serving = ["--admin-api-key", KEY, "--allow-pickled-tensors", *options.server_options.split()]
        with serve(folder, device="cuda", options=serving) as served:
            print(json.dumps({"start_s": round(served.start_s, 1), "taken_mib": taken_mib()}), flush=True)
            for part in options.parts.split(","):
                began_s = time.perf_counter()
                try:
                    found = run_part(part, options, folder, served)
                except Exception:  # noqa: BLE001  the other parts are worth their time
                    found = {"error": traceback.format_exc()[-3000:]}
                found = {
                    "part": part,
                    "shape": options.shape,
                    "took_s": round(time.perf_counter() - began_s, 1),
                } | found
                torch.cuda.empty_cache()
                torch.cuda.ipc_collect()
                results.append(found)
                print(json.dumps(found), flush=True)
                options.out.write_text(json.dumps(results))
    return int(any("error" in each or each.get("lost") or each.get("stale") for each in results))


if __name__ == "__main__":
    sys.exit(main())
