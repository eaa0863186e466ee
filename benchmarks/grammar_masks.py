#!/usr/bin/env python3
"""How long the masks of one step take by themselves, with 1, 2, 4, ... threads. It needs no GPU and no model.

    grammar_masks.py [--rows 64] [--steps 150] [--threads 1,4,8] [--model llama3.1-8b] [--out OUT.json]

All rows have the grammar of `gpu/grammar_run.py` and the vocabulary of a model's size. Each step fills the masks of all
rows, then every row takes a random token of its mask. Between two steps the process sleeps as it does while a GPU
computes, so its threads have to be woken again. `fill` is the wall time of the masks, `accept` that of the tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent / "gpu"))
from figures import Figures
from grammar_run import SCHEMA
from shapes import SHAPES, make_model

from headwater.grammars.compiler import GuidanceCompiler
from headwater.grammars.json_options import JsonOptions
from headwater.grammars.sources import from_json_schema
from headwater.tokenization.grammar_vocabulary import grammar_vocabulary
from headwater.tokenization.text_encoder import TextEncoder

ASLEEP_S = 0.003
NUM_ROUNDS = 2  # the second one finds the automata as the first one left them


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", default="1,4,8", help="numbers of threads, by commas")
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama3.1-8b", help="whose vocabulary's size")
    parser.add_argument("--out", type=Path, default=Path("/dev/null"))
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"rows": options.rows, "model": options.model})
    with tempfile.TemporaryDirectory() as root:
        encoder = TextEncoder.load(str(make_model(options.model, Path(root))))
    shape = SHAPES[options.model]
    vocabulary = grammar_vocabulary(encoder, vocab_size=shape["vocab_size"], end_ids=(shape["eos_token_id"],))
    for num_threads in map(int, options.threads.split(",")):
        compiler = GuidanceCompiler(lambda: vocabulary, vocab_size=shape["vocab_size"], num_threads=num_threads)
        for name, ms in measure(compiler, options).items():
            figures.put(f"{name}_threads{num_threads}", ms)
    return 0


def measure(compiler: GuidanceCompiler, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step, from the second round on."""
    compiled = compiler.compile(from_json_schema(SCHEMA, options=JsonOptions()))
    masks = np.zeros((options.rows, compiler.num_words), dtype=np.uint32)
    rng = np.random.default_rng(0)
    for _ in range(NUM_ROUNDS):
        fill_s: list[float] = []
        accept_s: list[float] = []
        cpu_s: list[float] = []
        matchers = [compiled.copy() for _ in range(options.rows)]
        for _ in range(options.steps):
            time.sleep(ASLEEP_S)
            began_s, cpu_began_s = time.perf_counter(), time.thread_time()
            compiler.fill(matchers, masks)
            fill_s.append(time.perf_counter() - began_s)
            cpu_s.append(time.thread_time() - cpu_began_s)
            bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
            chosen = [int(rng.choice(row.nonzero()[0])) for row in bits]
            began_s = time.perf_counter()
            for matcher, token in zip(matchers, chosen, strict=True):
                assert matcher.accept(token), matcher.error
            accept_s.append(time.perf_counter() - began_s)
    found = {
        "fill_ms": statistics.median(fill_s),
        "fill_mean_ms": statistics.fmean(fill_s),
        "fill_p95_ms": statistics.quantiles(fill_s, n=20)[-1],
        "fill_max_ms": max(fill_s),
        "fill_own_cpu_ms": statistics.fmean(cpu_s),  # of the calling thread
        "accept_ms": statistics.median(accept_s),
    }
    return {name: 1e3 * seconds for name, seconds in found.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
