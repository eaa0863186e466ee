"""The workloads W1 to W4: their prompts, concurrent streams and numbers of tokens.

| name | asks |
|---|---|
| W1 | one stream: 128 prompt tokens, 128 generated: the speed of decoding |
| W2 | 16 streams of 128 + 128 at once: throughput |
| W3_first | one request with a system prompt of 1,500 tokens, 32 generated: it fills the cache for W3_warm |
| W3_warm | 16 requests with that same system prompt, other questions of 32 tokens: what the cache saves |
| W3_cold_shared | the same with a system prompt not seen before: sharing while requests still run |
| W3_distinct | the same with 16 different system prompts: nothing to share |
| W4 | one prompt of 1,800 tokens, 2 generated: the speed of prefill |

All requests are OpenAI chat completions, streamed, greedy, with the end-of-sequence token ignored. Prompts
are random common words, fixed by a seed, cut to an exact number of tokens with the chat template counted.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from headwater.bench.words import WORDS
from headwater.tokenization.tokenizer import Tokenizer

Messages = list[dict[str, str]]

NUM_STREAMS = 16
WORKLOADS = ("W1", "W2", "W4", "W3")

@dataclass(frozen=True, slots=True)
class Measurement:
    """Requests that are sent at the same time."""

    workload: str
    requests: tuple[Messages, ...]
    max_tokens: int


class Prompts:
    """Random texts of exact lengths in tokens. The same salt and seed give the same text."""

    def __init__(self, tokenizer: Tokenizer, *, salt: str = "") -> None:
        self._tokenizer = tokenizer
        self._salt = salt

    def text(self, seed: str, num_tokens: int) -> str:
        """About `num_tokens` tokens, never more."""
        source = random.Random(f"{self._salt}/{seed}")
        words: list[str] = []
        count = 0
        while count < num_tokens:
            words += [source.choice(WORDS) for _ in range(max(1, num_tokens - count))]
            count = self._count(words)
        while count > num_tokens:
            words.pop()
            count = self._count(words)
        return " ".join(words)

    def chat(self, seed: str, num_tokens: int) -> Messages:
        """A conversation that is `num_tokens` long once the model's chat template is applied."""
        around = len(self._tokenizer.encode_chat(_messages("You are a helpful assistant.", "")))
        return _messages("You are a helpful assistant.", self.text(seed, num_tokens - around))

    def _count(self, words: list[str]) -> int:
        return len(self._tokenizer.encode(" ".join(words), add_special_tokens=False))


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def warm_up(prompts: Prompts) -> Iterator[Measurement]:
    """One unmeasured request of each shape, which starts threads, touches memory and selects kernels."""
    yield Measurement("warm-up", (prompts.chat("warm-a", 128),), 16)
    yield Measurement("warm-up", tuple(prompts.chat(f"warm-b{i}", 128) for i in range(NUM_STREAMS)), 16)
    yield Measurement("warm-up", (prompts.chat("warm-c", 1800),), 4)


def measurements(
    prompts: Prompts, *, repeat: int, only: tuple[str, ...] = WORKLOADS
) -> Iterator[Measurement]:
    """One repeat of the workloads named, with prompts that no other repeat uses."""
    streams = range(NUM_STREAMS)
    if "W1" in only:
        yield Measurement("W1", (prompts.chat(f"w1-{repeat}", 128),), 128)
    if "W2" in only:
        yield Measurement("W2", tuple(prompts.chat(f"w2-{repeat}-{i}", 128) for i in streams), 128)
    if "W4" in only:
        yield Measurement("W4", (prompts.chat(f"w4-{repeat}", 1800),), 2)
    if "W3" in only:
        questions = [prompts.text(f"tail-{i}", 32) for i in range(NUM_STREAMS + 1)]
        warm, cold = (prompts.text(f"w3-{kind}-{repeat}", 1500) for kind in ("warm", "cold"))
        distinct = [prompts.text(f"w3-distinct-{repeat}-{i}", 1500) for i in streams]
        yield Measurement("W3_first", (_messages(warm, questions[-1]),), 32)
        yield Measurement("W3_warm", tuple(_messages(warm, questions[i]) for i in streams), 32)
        yield Measurement("W3_cold_shared", tuple(_messages(cold, questions[i]) for i in streams), 32)
        yield Measurement("W3_distinct", tuple(_messages(distinct[i], questions[i]) for i in streams), 32)
