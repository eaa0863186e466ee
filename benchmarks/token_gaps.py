#!/usr/bin/env python3
"""The gaps between the tokens of many short streams, which show every short stop of the server.

    token_gaps.py [OUT.json] [--requests 2500] [--streams 16]
    token_gaps.py [OUT.json] --beside 1800 [--repeats 5] [--serve "--chunked-prefill-size 512"]

The script starts a server on the CPU, with a model so small that the server itself takes most of the time: random
weights, 128 prompt tokens, 24 generated tokens. `--beside N` instead measures one stream of the default model while a
prompt of N tokens is prefilled: its longest gap, and the time until the prompt is answered, beside it and alone.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from served import serve, stream
from shapes import make_model

from headwater.launch.default_model import ensure_default_model
from workloads import Prompts, random_prompts

NUM_PROMPT_TOKENS, NUM_TOKENS = 128, 24
NUM_STREAMED = 160  # tokens of the stream beside a long prompt


async def gaps_s(prompts: Prompts, *, num_streams: int) -> list[float]:
    """Stream all prompts, `num_streams` at a time; return the seconds between neighbouring tokens, ascending."""
    may_start = asyncio.Semaphore(num_streams)

    async def one(prompt: list[int]) -> list[float]:
        async with may_start:
            came_s, _ = await stream(prompt, NUM_TOKENS)
        return [later - earlier for earlier, later in itertools.pairwise(came_s)]

    return sorted(itertools.chain.from_iterable(await asyncio.gather(*map(one, prompts))))


async def gap_beside_s(num_tokens: int, *, seed: int) -> dict[str, float]:
    """Seconds: the stream's longest gap once the long prompt was sent, and the long prompt's way to its first token."""
    short, (long, other) = random_prompts(1, 64, seed=seed)[0], random_prompts(2, num_tokens, seed=seed + 1)
    sent_s = time.perf_counter()
    alone, _ = await stream(other, 2)
    found = {"alone": alone[0] - sent_s}
    running = asyncio.create_task(stream(short, NUM_STREAMED))
    await asyncio.sleep(0.5)
    sent_s = time.perf_counter()
    came_s, _ = await stream(long, 2)
    found["beside"] = came_s[0] - sent_s
    gaps = [later - earlier for earlier, later in itertools.pairwise((await running)[0]) if sent_s < later]
    return found | {"longest_gap": max(gaps), "median_gap": statistics.median(gaps)}


def measure_beside(num_tokens: int, *, repeats: int, flags: Sequence[str]) -> dict[str, list[float]]:
    """The figures of `gap_beside_s`, of each repeat."""
    model = ensure_default_model()
    with serve(model, device="cpu", options=("--load-format", "auto", "--log-level", "error", *flags)):
        runs = [asyncio.run(gap_beside_s(num_tokens, seed=100 * repeat)) for repeat in range(repeats + 1)][1:]
    return {f"{name}_ms": [round(run[name] * 1e3, 1) for run in runs] for name in runs[0]}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--beside", type=int, help="tokens of a prompt that is prefilled beside one stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", default="", help="more arguments for `headwater serve`, with --beside")
    options = parser.parse_args(argv)
    if options.beside:
        figures: dict[str, object] = {}
        figures |= measure_beside(options.beside, repeats=options.repeats, flags=options.serve.split())
        print(json.dumps(figures))
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as root:
        flags = ("--max-running-requests", str(options.streams), "--log-level", "error")
        with serve(make_model("tiny", Path(root)), device="cpu", options=flags):
            prompts = random_prompts(options.requests, NUM_PROMPT_TOKENS, seed=1)
            gaps = asyncio.run(gaps_s(prompts, num_streams=options.streams))
    figures = {f"p{share}_ms": round(gaps[int(len(gaps) * share / 100)] * 1e3, 2) for share in (50, 99, 99.9)}
    figures |= {"longest_ms": [round(gap * 1e3, 1) for gap in gaps[-5:]], "num_gaps": len(gaps)}
    print(json.dumps(figures))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
