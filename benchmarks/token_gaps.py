#!/usr/bin/env python3
"""The gaps between the tokens of many short streams, which show every short stop of the server.

    token_gaps.py [OUT.json] [--requests 2500] [--streams 16]

The script starts a server on the CPU, with a model so small that the server itself takes most of the time: random
weights, 128 prompt tokens, 24 generated tokens.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from served import serve, stream
from shapes import make_model

from workloads import Prompts, random_prompts

NUM_PROMPT_TOKENS, NUM_TOKENS = 128, 24


async def gaps_s(prompts: Prompts, *, num_streams: int) -> list[float]:
    """Stream all prompts, `num_streams` at a time; return the seconds between neighbouring tokens, ascending."""
    may_start = asyncio.Semaphore(num_streams)

    async def one(prompt: list[int]) -> list[float]:
        async with may_start:
            came_s, _ = await stream(prompt, NUM_TOKENS)
        return [later - earlier for earlier, later in itertools.pairwise(came_s)]

    return sorted(itertools.chain.from_iterable(await asyncio.gather(*map(one, prompts))))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--streams", type=int, default=16)
    options = parser.parse_args(argv)
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
