#!/usr/bin/env python3
"""Greedy text of several ranks beside that of one, token for token, with the same random weights.

    ranks_equal.py OUT.json [--ranks 4] [--dtypes float32,bfloat16] [--device cpu]

2, 4 and 8 ranks, as far as there are `--ranks`. In float32 all texts must be equal: the exit status says so. In other
formats sums round differently, so the share of equal texts and of tokens before the first difference are figures only.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures import Figures
from shapes import SHAPES, make_model

import workloads

NUM_PROMPTS, NUM_TOKENS = 12, 48
LENGTHS = (1, 17, 128, 300, 640)


def texts_of(folder: Path, *, tp_size: int, dtype: str, device: str) -> list[list[int]]:
    """Long and short prompts together, then again: the second time their pages are cached."""
    from headwater import Engine

    source = workloads.random_prompts(NUM_PROMPTS, max(LENGTHS), seed=7)
    prompts = [[token % 4000 for token in prompt[: LENGTHS[i % len(LENGTHS)]]] for i, prompt in enumerate(source)]
    greedy = {"temperature": 0, "ignore_eos": True, "max_new_tokens": NUM_TOKENS}
    with Engine(
        str(folder), load_format="dummy", device=device, dtype=dtype, tp_size=tp_size, context_length=1024,
        max_total_tokens=16_384, max_running_requests=16, log_level="warning",
    ) as engine:  # fmt: skip
        rounds = [engine.generate(input_ids=prompts, sampling_params=greedy) for _ in range(2)]
    return [answer["output_ids"] for answers in rounds for answer in answers]


def same_tokens(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = enumerate(zip(found, expected, strict=True))
    return next((index for index, (ours, theirs) in pairs if ours != theirs), len(expected))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="small", choices=sorted(SHAPES))
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model, "device": options.device})
    heads = SHAPES[options.model]["num_attention_heads"]
    sizes = [size for size in (2, 4, 8) if size <= options.ranks and heads % size == 0]
    is_equal = True
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        for dtype in options.dtypes.split(","):
            expected = texts_of(folder, tp_size=1, dtype=dtype, device=options.device)
            figures.put(f"{dtype}_distinct_tokens", len({token for text in expected for token in text}))
            for size in sizes:
                found = texts_of(folder, tp_size=size, dtype=dtype, device=options.device)
                same = [same_tokens(*pair) for pair in zip(found, expected, strict=True)]
                figures.put(f"{dtype}_tp{size}_equal_texts", sum(num == NUM_TOKENS for num in same) / len(same))
                figures.put(f"{dtype}_tp{size}_tokens_before_a_difference", sum(same) / len(same))
                is_equal &= dtype != "float32" or found == expected
    figures.put("float32_is_equal", is_equal)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
