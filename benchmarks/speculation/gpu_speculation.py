#!/usr/bin/env python3
"""Speculative decoding with a model that repeats its prompt by construction, on one GPU.

    gpu_speculation.py MODEL OUT.json [--tokens 256] [--repeat 3] [--rows 1,8,32,64] [--device cuda]

Random weights do not repeat text. Here the products that leave attention and MLP are zero, and the head is the
embedding one row further. So each token is followed by the next id, whatever else is computed; a step reads all weights
and all KV, as with any others. A prompt that counts up and begins again is then copied, as a summary or a correction
copies its text. Drafts come from the real n-gram look-up, and texts with and without them must be the same.

- `draftK`: one stream with drafts of K tokens in each step, all right: milliseconds of a step and of a token. `draft0`
  is without speculation, launched ahead. `waits` has no drafts, but waits for each token before the next step.
- `long_`: the same behind 12,000 tokens.
- `copy`, `edit`, `new`: the server's own choice of lengths. In `edit` one token of ten differs from the prompt; `new`
  repeats nothing. Each with speculation on and off, in turns, as tokens a second; `ratio` is of medians.

What this shows is the cost of steps, and what drafts bring that are right so often; it says nothing of how often real
texts repeat. With `--device cpu` a small model tries the script out.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
from figures import Figures
from shapes import SHAPES, make_model

GREEDY = {"temperature": 0, "ignore_eos": True}
LENGTHS = (0, 1, 2, 3, 4, 7, 8, 12, 15)
LONG = 12_000
REPEATED = 600  # tokens of other prompts that are copied
EDITED = 10  # one token of so many differs


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model, "device": options.device, "tokens": options.tokens})
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        if options.device == "cpu":
            save_counting_weights(folder)
        run(folder, options, figures)
    return 0


def run(folder: Path, options: argparse.Namespace, figures: Figures) -> None:
    from headwater import Engine
    from headwater.heap import freeze_heap

    started_s = time.perf_counter()
    with Engine(
        str(folder),
        load_format="auto" if options.device == "cpu" else "dummy",
        device=options.device,
        context_length=16_384,
        max_running_requests=64,
        speculative_algorithm="ngram",
        speculative_num_draft_tokens=15,
        log_level="info",
    ) as engine:
        figures.put("engine_start_s", time.perf_counter() - started_s)
        if options.device == "cuda":
            count_up(engine._engine._steps._runner._runner.model)
        case = Case(engine, options.tokens)
        for num_rows in sorted({1, *map(int, options.rows.split(","))}):
            case.measure("copy", num_rows, seed=num_rows)  # kernels, and how often drafts are right
        freeze_heap()
        fixed_lengths(case, figures, repeat=max(options.repeat - 1, 1))
        own_lengths(case, figures, rows=[int(it) for it in options.rows.split(",")], repeat=options.repeat)
        figures.put("texts_that_differ", case.num_differing)


class Case:
    """Requests to one engine, whose speculation is turned on and off between them."""

    def __init__(self, engine: Any, num_tokens: int) -> None:
        self._engine = engine
        self._num_tokens = num_tokens
        self.scheduler = engine._engine._scheduler
        self.num_differing = 0

    def measure(self, kind: str, num_rows: int, *, seed: int, repeated: int = REPEATED) -> dict[str, float]:
        """Milliseconds of a step and of each row's token, tokens a second, and how drafts fared; prefill left out."""
        spent_s, steps = [], []
        before = self._counts()
        for length in (2, 2 + self._num_tokens):
            vocab_size = self._engine.ready.vocab_size
            prompts = [prompt(kind, repeated, vocab_size, seed=1000 * seed + row) for row in range(num_rows)]
            launched, began_s = self.scheduler._num_launched, time.perf_counter()
            answers = self._engine.generate(input_ids=prompts, sampling_params=GREEDY | {"max_new_tokens": length})
            spent_s.append(time.perf_counter() - began_s)
            steps.append(self.scheduler._num_launched - launched)
            for asked, answer in zip(prompts, answers, strict=True):
                expected = [(asked[-1] + place) % vocab_size for place in range(1, length + 1)]
                self.num_differing += answer["output_ids"] != expected
            assert self._engine.flush_cache(timeout=30).success
        drafted, accepted = (after - count for after, count in zip(self._counts(), before, strict=True))
        decode_s = spent_s[1] - spent_s[0]
        return {
            "step_ms": 1e3 * decode_s / max(steps[1] - steps[0], 1),
            "token_ms": 1e3 * decode_s / self._num_tokens,
            "tokens_per_s": num_rows * self._num_tokens / decode_s,
            "tokens_per_step": self._num_tokens / max(steps[1] - steps[0], 1),
            "accept_rate": accepted / drafted if drafted else 0.0,
        }

    def _counts(self) -> tuple[int, int]:
        return self.scheduler.counters.spec_draft_tokens, self.scheduler.counters.spec_accepted_tokens

    @contextmanager
    def without_drafts(self, *, waits: bool = False) -> Iterator[None]:
        """`waits`: each step is nevertheless planned upon known tokens."""
        speculation = self.scheduler.speculation
        found: dict[str, Any] = {"_drafter": None}
        if waits:
            running = self.scheduler.running
            found["awaits_tokens"] = lambda: any(it.progress.num_launched_samples > it.num_outputs for it in running)
        with patch.multiple(speculation, **found):
            yield

    @contextmanager
    def of_length(self, length: int) -> Iterator[None]:
        """Each draft has `length` tokens, whatever they cost."""
        fixed: Callable[..., int] = lambda rate, most, **_: most  # noqa: E731
        with (
            patch("headwater.scheduling.speculation.acceptance.best_length", fixed),
            patch("headwater.scheduling.speculation.speculation.best_length", fixed),
            patch.object(self.scheduler.speculation, "_num_draft_tokens", length),
        ):
            yield


def prompt(kind: str, repeated: int, vocab_size: int, *, seed: int) -> list[int]:
    """A text whose end is its beginning: the model goes on as it did."""
    source = random.Random(seed)
    first = source.randrange(vocab_size)
    text = [(first + place) % vocab_size for place in range(repeated)]
    if kind == "new":
        return [source.randrange(vocab_size) for _ in range(repeated + 2)]
    changed = range(4, repeated, EDITED) if kind == "edit" else ()
    for place in changed:
        text[place] = source.randrange(vocab_size)
    return [*text, *((first + place) % vocab_size for place in range(2))]


def fixed_lengths(case: Case, figures: Figures, *, repeat: int) -> None:
    """One stream, behind few tokens and behind many."""
    for name, repeated, lengths in (("", REPEATED, LENGTHS), ("long_", LONG, (0, 3, 7, 15))):
        found: dict[str, list[dict[str, float]]] = {}
        for seed in range(1, 1 + repeat):
            with case.without_drafts(waits=True):
                found.setdefault("waits", []).append(case.measure("copy", 1, seed=seed, repeated=repeated))
            for length in lengths:
                with case.of_length(length) if length else case.without_drafts():
                    measured = case.measure("copy", 1, seed=seed + 100 * length, repeated=repeated)
                found.setdefault(f"draft{length}", []).append(measured)
        for label, runs in found.items():
            for figure in ("step_ms", "token_ms", "tokens_per_step"):
                figures.put(f"{name}{label}_{figure}", statistics.median(run[figure] for run in runs))


def own_lengths(case: Case, figures: Figures, *, rows: Sequence[int], repeat: int) -> None:
    """The server's lengths, beside the same requests without speculation, in turns."""
    for num_rows in rows:
        for kind in ("copy", "edit", "new") if num_rows == 1 else ("copy", "new"):
            found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
            for seed in range(1, 1 + repeat):
                for is_on in (True, False) if seed % 2 else (False, True):
                    if is_on:
                        found[True].append(case.measure(kind, num_rows, seed=seed))
                    else:
                        with case.without_drafts():
                            found[False].append(case.measure(kind, num_rows, seed=seed))
            speeds = {is_on: statistics.median(run["tokens_per_s"] for run in runs) for is_on, runs in found.items()}
            name = f"rows{num_rows}_{kind}"
            figures.put(f"{name}_on_tokens_per_s", speeds[True])
            figures.put(f"{name}_off_tokens_per_s", speeds[False])
            figures.put(f"{name}_ratio", speeds[True] / speeds[False])
            for figure in ("tokens_per_step", "accept_rate"):
                figures.put(f"{name}_{figure}", statistics.median(run[figure] for run in found[True]))


def count_up(model: Any) -> None:
    """Make a model on the device one that counts, in place: CUDA graphs go on reading the same memory."""
    import torch

    with torch.inference_mode():
        weights = dict(model.iter_named())
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        weights["lm_head.weight"].copy_(weights["model.embed_tokens.weight"].roll(1, dims=0))
        torch.cuda.synchronize()


def save_counting_weights(folder: Path) -> None:
    """The same as files, of a small shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.lm_head.weight.copy_(model.get_input_embeddings().weight.roll(1, dims=0))
    model.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
