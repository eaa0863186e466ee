"""KV that identifies its origin: one 64-bit number per token, made of all earlier tokens."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, repeat

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_ODD = np.arange(1, 1 << 17, 2, dtype=np.uint64)  # factors of positions; no simulated context is longer
_NUM_CLASSES = 31
START = 0x9E3779B97F4A7C15  # the canary before position 0


def mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def next_canary(before: int, token_id: int, weights: str, namespace: str = "") -> int:
    """The KV of a token, made of the previous canary, the token, the weights and the namespace."""
    return mix(before ^ _mixed[token_id] ^ origin(weights, namespace))


def next_canaries(before: int, token_ids: Iterable[int], origin: int) -> list[int]:
    """`next_canary` of each token in order, starting after `before`. `origin` is the result of that function."""
    canaries: list[int] = []
    mixed = _mixed
    for token_id in token_ids:  # `mix`, inlined: a simulation spends most of its time here
        value = before ^ mixed[token_id] ^ origin
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
        before = value ^ (value >> 31)
        canaries.append(before)
    return canaries


class _MixedTokens(dict[int, int]):
    """The contribution of each token to its canary. A dict, since every computed token needs a lookup."""

    def __missing__(self, token_id: int) -> int:
        self[token_id] = mixed = mix(token_id + 1)
        return mixed


_mixed = _MixedTokens()


@functools.cache
def origin(weights: str, namespace: str = "") -> int:
    """The contribution of weights and namespace to each canary."""
    name = weights if not namespace else f"{weights}\0{namespace}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def namespace_text(cache_salt: str, extra_key: str, adapter: str = "") -> str:
    """The text of a namespace in canaries; empty for requests without salt, key and adapter."""
    return with_adapter(f"{cache_salt}\0{extra_key}" if cache_salt or extra_key else "", adapter)


def with_adapter(namespace: str, adapter: str) -> str:
    """A namespace's text without an adapter, with one added; "" adds none."""
    return f"{namespace}\0\0{adapter}" if adapter else namespace


def total_of(canaries: npt.NDArray[np.uint64]) -> int:
    """All KV in one number, each position with a weight of its own."""
    return int(canaries.dot(_ODD[: len(canaries)]))


def token_from(total: int, vocab_size: int) -> int:
    """The next token, a function of the total of all KV that is read: with one wrong page the text differs."""
    return mix(total & _MASK) % vocab_size


def expected_tokens(
    prompt: list[int],
    num_tokens: int,
    vocab_size: int,
    weights: Sequence[str] | str = "w0",
    *,
    namespace: str = "",
    choose: Callable[[int, list[int]], int] | None = None,
) -> list[int]:
    """The result of greedy generation from `prompt`, from tokens, weights and namespace alone.

    `weights` names the weights of each position; the last name applies to all further positions. `choose` gives the
    token for a total and the tokens generated here, if a grammar limits the choice.
    """
    names = [weights] if isinstance(weights, str) else weights
    origin_of = {name: origin(name, namespace) for name in set(names)}
    origins = chain([origin_of[name] for name in names], repeat(origin_of[names[-1]]))
    mixed = _mixed
    before, total, weight = START, 0, 1
    for token_id, origin_ in zip(prompt, origins, strict=False):  # origins never end
        value = before ^ mixed[token_id] ^ origin_  # `mix`, inlined as above
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
        before = value ^ (value >> 31)
        total += before * weight
        weight += 2
    tokens: list[int] = []
    for origin_ in islice(origins, num_tokens):
        token_id = token_from(total, vocab_size) if choose is None else choose(total, tokens)
        tokens.append(token_id)
        before = mix(before ^ mixed[token_id] ^ origin_)
        total += before * weight
        weight += 2
    return tokens


def pooled_canaries(canaries: bytes) -> npt.NDArray[np.floating]:
    """What stands for the sum of hidden states: how many canaries (uint64 each) fall into each of some classes."""
    classes = np.frombuffer(canaries, dtype=np.uint64) % np.uint64(_NUM_CLASSES)
    return np.bincount(classes.astype(np.intp), minlength=_NUM_CLASSES).astype(np.float32)
