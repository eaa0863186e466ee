"""KV that tells where it came from: one 64-bit number a token, made of everything before it."""

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
START = 0x9E3779B97F4A7C15  # the canary before position 0


def mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def next_canary(before: int, token_id: int) -> int:
    return mix(before ^ mix(token_id + 1))


def token_from(canaries: npt.NDArray[np.uint64], vocab_size: int) -> int:
    """The next token, a function of all KV that is read: one wrong page and the text differs."""
    odd = np.arange(1, 2 * len(canaries), 2, dtype=np.uint64)
    return mix(int((canaries * odd).sum(dtype=np.uint64))) % vocab_size


def expected_tokens(prompt: list[int], num_tokens: int, vocab_size: int) -> list[int]:
    """What greedy generation from `prompt` must give, from the tokens alone."""
    canaries: list[int] = []
    for token in prompt:
        canaries.append(next_canary(canaries[-1] if canaries else START, token))
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens.append(token_from(np.array(canaries, dtype=np.uint64), vocab_size))
        canaries.append(next_canary(canaries[-1], tokens[-1]))
    return tokens
