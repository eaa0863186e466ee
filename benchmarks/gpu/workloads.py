"""Workloads B1 to B4 in token ids: what an offline engine is asked for, and what is read off the clock.

B1: 256 prompts of 100 to 1,024 tokens, 100 to 1,024 tokens each. B2: one stream. B3: 64 prompts of 1,024 tokens, 256
tokens each. B4: 64 prompts that share 4,096 tokens, cold, with new ends, and again.
"""

import random
import time
from collections.abc import Callable, Sequence

Prompts = list[list[int]]
Generate = Callable[[Prompts, Sequence[int]], int]  # prompts, tokens wanted of each -> tokens that came; all are done
Put = Callable[[str, float], None]


def random_prompts(num: int, length: int, *, seed: int) -> Prompts:
    source = random.Random(seed)
    return [[source.randint(0, 10_000) for _ in range(length)] for _ in range(num)]


def prompts_of_mixed_lengths() -> tuple[Prompts, list[int]]:
    """B1's prompts and output lengths."""
    source = random.Random(0)
    prompts = [[source.randint(0, 10_000) for _ in range(source.randint(100, 1024))] for _ in range(256)]
    return prompts, [source.randint(100, 1024) for _ in range(256)]


def prompts_with_shared_prefix(num: int, *, shared: int, own: int, seed: int) -> Prompts:
    source = random.Random(seed)
    prefix = [source.randint(0, 10_000) for _ in range(shared)]
    return [prefix + [source.randint(0, 10_000) for _ in range(own)] for _ in range(num)]


def seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def warm_up(generate: Generate) -> None:
    generate(random_prompts(4, 64, seed=99), [8] * 4)
    generate(random_prompts(64, 512, seed=98), [16] * 64)


def one_stream(generate: Generate, put: Put) -> None:
    for repeat in range(3):
        first = random_prompts(1, 1024, seed=10 + repeat)
        ttft_s = seconds(lambda first=first: generate(first, [1]))
        whole = random_prompts(1, 1024, seed=20 + repeat)
        total_s = seconds(lambda whole=whole: generate(whole, [257]))
        put(f"B2_first_token_ms_run{repeat}", ttft_s * 1e3)
        put(f"B2_ms_per_token_run{repeat}", (total_s - ttft_s) / 256 * 1e3)


def many_streams(generate: Generate, put: Put) -> None:
    for repeat in range(2):
        first, second = (random_prompts(64, 1024, seed=30 + 2 * repeat + number) for number in range(2))
        prefill_s = seconds(lambda first=first: generate(first, [1] * 64))
        total_s = seconds(lambda second=second: generate(second, [256] * 64))
        put(f"B3_output_tokens_per_s_run{repeat}", 64 * 256 / total_s)
        put(f"B3_prefill_tokens_per_s_run{repeat}", 64 * 1024 / prefill_s)
        put(f"B3_step_ms_run{repeat}", (total_s - prefill_s) / 255 * 1e3)


def mixed_lengths(generate: Generate, put: Put, flush: Callable[[], object]) -> None:
    prompts, lengths = prompts_of_mixed_lengths()
    for repeat in range(2):
        flush()
        total_s = seconds(lambda: generate(prompts, lengths))
        put(f"B1_output_tokens_per_s_run{repeat}", sum(lengths) / total_s)


def shared_prefix(generate: Generate, put: Put, flush: Callable[[], object]) -> None:
    for repeat in range(3):
        flush()
        prompts = prompts_with_shared_prefix(64, shared=4096, own=64, seed=40 + repeat)
        new_ends = [
            prompt[:4096] + [(token * 7 + repeat + 1) % 10_000 for token in prompt[4096:]] for prompt in prompts
        ]
        for label, asked in (("cold", prompts), ("new_ends", new_ends), ("repeat", prompts)):
            put(f"B4_{label}_s_run{repeat}", seconds(lambda asked=asked: generate(asked, [1] * 64)))
    flush()
    distinct = random_prompts(16, 4160, seed=50)
    put("B4_distinct_prefill_tokens_per_s", 16 * 4160 / seconds(lambda: generate(distinct, [1] * 16)))


def long_prompt(generate: Generate, put: Put, *, length: int) -> None:
    """A prompt of `length` tokens alone: its prefill, and decode steps at its end."""
    first, second = (random_prompts(1, length, seed=60 + number) for number in range(2))
    prefill_s = seconds(lambda: generate(first, [1]))
    total_s = seconds(lambda: generate(second, [65]))
    put(f"long_{length}_prefill_tokens_per_s", length / prefill_s)
    put(f"long_{length}_ms_per_token", (total_s - prefill_s) / 64 * 1e3)
