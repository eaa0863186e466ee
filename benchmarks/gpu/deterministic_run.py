#!/usr/bin/env python3
"""--deterministic: the same prompts alone, in batches, in chunks, from the cache and scored again; and what it costs.

deterministic_run.py OUT.json [--shape llama3.1-8b] [--device cuda] [--parts bits,plain,cost]

`bits` compares tokens and the bits of all log-probabilities with those of each prompt alone: `different` must be 0.
`plain` is the same without the flag, to show that the comparison can fail. `cost` is milliseconds of a decode step of
1, 8 and 64 rows and of a prompt, with the flag and without. Every part prints a line of JSON, also if it fails.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from shapes import make_model

from headwater import Engine

ENGINE = {
    "load_format": "dummy",
    "max_running_requests": 64,
    "max_total_tokens": 98304,
    "context_length": 8192,
    "log_level": "warning",
}
Told = tuple[list[int], list[tuple[float, int]]]


def prompts_of(count: int, *, longest: int) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(300, 11000) for _ in range(source.randint(20, longest))] for _ in range(count)]


def told(answer: dict[str, Any]) -> Told:
    return answer["output_ids"], [tuple(it[:2]) for it in answer["meta_info"]["output_token_logprobs"]]


def ask(engine: Engine, prompts: list[list[int]], num_tokens: int, **more: Any) -> list[Told]:
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": num_tokens}
    answers = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True, **more)
    return [told(answer) for answer in answers]


def flushed(engine: Engine) -> None:
    assert engine.flush_cache(timeout=30).success


def compare(folder: Path, flags: dict[str, Any], num_prompts: int, *, longest: int, num_tokens: int) -> dict[str, Any]:
    """How many prompts have other tokens or other bits than alone, in each situation."""
    prompts = prompts_of(num_prompts, longest=longest)
    different: dict[str, int] = {}

    def count(name: str, found: list[Told], of: list[Told]) -> None:
        different[name] = sum(one != other for one, other in zip(found, of, strict=True))

    with Engine(str(folder), **ENGINE, **flags) as engine:
        alone = []
        for prompt in prompts:
            alone += ask(engine, [prompt], num_tokens)
            flushed(engine)
        for size in (7, num_prompts):
            found: list[Told] = []
            for first in range(0, num_prompts, size):
                found += ask(engine, prompts[first : first + size], num_tokens)
                flushed(engine)
            count(f"batches of {size}", found, alone)
        ask(engine, [prompt[: len(prompt) // 2] for prompt in prompts], 1)
        count("half of each cached", ask(engine, prompts, num_tokens), alone)
        count("all cached", ask(engine, prompts, num_tokens), alone)
        flushed(engine)
        whole = [[*prompt, *outputs] for prompt, (outputs, _) in zip(prompts, alone, strict=True)]
        sampling = {"temperature": 0, "max_new_tokens": 0}
        again = []
        for text, prompt in zip(whole, prompts, strict=True):
            (scored,) = engine.generate(
                input_ids=[text], sampling_params=sampling, return_logprob=True, logprob_start_len=len(prompt) - 1
            )
            again.append([tuple(it[:2]) for it in scored["meta_info"]["input_token_logprobs"]][-num_tokens:])
            flushed(engine)
        count("scored again", [(out, it) for (out, _), it in zip(alone, again, strict=True)], alone)
    with Engine(str(folder), **ENGINE, **flags, chunked_prefill_size=96) as engine:
        count("chunks of 96 tokens", ask(engine, prompts, num_tokens), alone)
    return {"num_prompts": num_prompts, "tokens": num_tokens, "different": different}


def timed(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    began_s = time.perf_counter()
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": num_tokens}
    engine.generate(input_ids=prompts, sampling_params=sampling)
    return time.perf_counter() - began_s


def cost(folder: Path, flags: dict[str, Any], *, prompt_tokens: int) -> dict[str, float]:
    """Milliseconds, of the second run each."""
    found = {}
    with Engine(str(folder), **ENGINE, **flags, disable_radix_cache=True) as engine:
        for rows in (1, 8, 64):
            prompts = prompts_of(rows, longest=64)
            for _ in range(2):
                short, long = timed(engine, prompts, 2), timed(engine, prompts, 66)
            found[f"decode step of {rows} rows, ms"] = round((long - short) / 64 * 1000, 2)
        prompt = [[300 + at % 9000 for at in range(prompt_tokens)]]
        for _ in range(2):
            found[f"prompt of {prompt_tokens} tokens, ms"] = round(timed(engine, prompt, 1) * 1000, 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama3.1-8b", help="a shape of shapes.py")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default="bits,plain,cost")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--longest", type=int, default=700, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    options = parser.parse_args()
    device, results = {"device": options.device}, []
    sizes = {"longest": options.longest, "num_tokens": options.tokens}
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.shape, Path(root))
        for part in options.parts.split(","):
            began_s = time.perf_counter()
            try:
                if part == "cost":
                    found: dict[str, Any] = {
                        str(flag): cost(folder, device | {"deterministic": flag}, prompt_tokens=4 * options.longest)
                        for flag in (True, False)
                    }
                else:
                    flags = device | {"deterministic": part == "bits"}
                    found = compare(folder, flags, options.prompts, **sizes)
            except Exception:  # noqa: BLE001  the other parts are worth their time
                found = {"error": traceback.format_exc()[-3000:]}
            results.append({"part": part, "took_s": round(time.perf_counter() - began_s, 1)} | found)
            print(json.dumps(results[-1]), flush=True)
            options.out.write_text(json.dumps({"shape": options.shape, "results": results}))
    wrong = [
        each for each in results if "error" in each or (each["part"] == "bits" and any(each["different"].values()))
    ]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
