"""Which part of a model a rank computes with: some query heads and their KV heads, MLP columns (of every
expert), and tokens.

Products whose outputs are cut (q, k, v, gate, up, head) need no sum. Products whose inputs are cut (o, down) give
partial sums, which are added up over ranks (arXiv 1909.08053).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.devices.rank_group import RankGroup
from headwater.devices.scaled_tensor import ScaledTensor
from headwater.models.config import ModelConfig

Floats = npt.NDArray[np.float32]
Whole = HostTensor | ScaledTensor | RandomTensor
_MOST_IMBALANCE = 1.25  # the largest share of an uneven cut against an even one
_COLUMN_UNITS = (256, 32, 16, 2, 1)  # blocks of GGUF's formats first
_TOKEN_UNITS = (64, 16, 1)
_OF_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True, slots=True)
class ModelShare:
    """The share of rank `rank` of `size`. Methods give what it holds of a model of some config."""

    rank: int
    size: int

    @classmethod
    def of(cls, ranks: RankGroup) -> "ModelShare":
        return cls(ranks.rank, ranks.size)

    def heads(self, config: ModelConfig) -> range:
        """Query heads."""
        num = config.num_heads // self.size
        return range(self.rank * num, (self.rank + 1) * num)

    def kv_heads(self, config: ModelConfig) -> range:
        """KV heads. Several ranks hold the same one where there are fewer heads than ranks."""
        if config.num_kv_heads >= self.size:
            num = config.num_kv_heads // self.size
            return range(self.rank * num, (self.rank + 1) * num)
        head = self.rank * config.num_kv_heads // self.size
        return range(head, head + 1)

    def mlp_columns(self, config: ModelConfig, *, of_expert: bool = False) -> range:
        """Inner features of an MLP or an expert, cut at the borders of quantised blocks where that is nearly even."""
        size = _inner_size(config, of_expert=of_expert)
        return self._range(size, _column_unit(size, self.size))

    def tokens(self, config: ModelConfig) -> range:
        """Tokens whose embeddings and logits it has."""
        return self._range(config.vocab_size, _token_unit(config.vocab_size, self.size))

    def _range(self, total: int, unit: int) -> range:
        """Units are dealt out evenly; the last one may be a part."""
        num_units = -(-total // unit)
        start, stop = (rank * num_units // self.size * unit for rank in (self.rank, self.rank + 1))
        return range(start, min(stop, total))

    def owns_kv_heads(self, config: ModelConfig) -> bool:
        """Whether no rank before it holds the same KV heads."""
        return self.rank % max(self.size // config.num_kv_heads, 1) == 0

    def rows(self, name: str, config: ModelConfig) -> list[range] | None:
        """Which rows of a parameter it has, a range of each matrix that is fused in it; None: all of them."""
        which, kind = _which(name)
        heads, kv_heads = self.heads(config), self.kv_heads(config)
        q, kv = _features(heads, config), _features(kv_heads, config)
        if which in ("q_proj", "k_proj", "v_proj"):
            return [q if which == "q_proj" else kv]
        if which == "qkv_proj":
            return [q, _behind(kv, config.q_size), _behind(kv, config.q_size + config.kv_size)]
        if which in ("q_norm", "k_norm") and config.qk_norm_whole:
            return [q if which == "q_norm" else kv]
        if kind == "sinks":
            return [heads]
        inner = self.mlp_columns(config, of_expert=_is_of_expert(name))
        if which in ("gate_proj", "up_proj"):
            return [inner]
        if which == "gate_up_proj":
            return [inner, _behind(inner, config.intermediate_size)]
        return [self.tokens(config)] if which in ("embed_tokens", "lm_head") else None

    def cut(self, name: str, weight: Whole, config: ModelConfig) -> Whole:
        """Its part of one parameter, a view where possible. ValueError if that would cut through a quantised block.

        Biases that are added after a sum over ranks belong to rank 0; the others get zeros.
        """
        if self.size == 1:
            return weight
        rows = self.rows(name, config)
        if rows is not None:
            return weight.rows(rows[0].start, rows[0].stop) if len(rows) == 1 else weight.take_ranges(rows)
        which, kind = _which(name)
        if which not in ("o_proj", "down_proj"):
            return weight
        if kind == "bias":
            return weight if self.rank == 0 else HostTensor.of(np.zeros(weight.shape, dtype=np.float32))
        is_o = which == "o_proj"
        inner = self.mlp_columns(config, of_expert=_is_of_expert(name))
        columns = _features(self.heads(config), config) if is_o else inner
        try:
            return weight.columns(columns.start, columns.stop)
        except ValueError as error:
            raise ValueError(f"--tp-size {self.size} does not fit tensor {name!r}: {error}") from None


WHOLE = ModelShare(0, 1)


def join(name: str, parts: Sequence[Floats], config: ModelConfig) -> Floats:
    """The inverse of `ModelShare.cut`: one parameter, or its first rows, from the parts of all ranks."""
    size, (which, kind) = len(parts), _which(name)
    pieces: dict[int, Floats] = {}  # by their first row in the whole: several ranks may hold the same head
    for rank, part in enumerate(parts):
        at = 0
        for rows in ModelShare(rank, size).rows(name, config) or []:
            pieces.setdefault(rows.start, part[at : at + len(rows)])
            at += len(rows)
    if pieces:
        return np.concatenate([pieces[start] for start in sorted(pieces)])
    if which in ("o_proj", "down_proj") and kind != "bias":
        return np.concatenate(parts, axis=1)
    return parts[0]


def check_tp_size(config: ModelConfig, size: int) -> None:
    """ValueError if a model of this config cannot be shared by `size` ranks."""
    if size < 1:
        raise ValueError(f"--tp-size must be at least 1, found {size}")
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % size:
        fit = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0 and _has_whole_kv_heads(kv_heads, n))
        raise ValueError(f"--tp-size {size} does not divide the model's {heads} query heads: take one of {fit}")
    if not _has_whole_kv_heads(kv_heads, size):
        raise ValueError(
            f"--tp-size {size} does not fit the model's {kv_heads} KV heads: it must divide them, or be a multiple"
        )
    inner = min(_inner_size(config, of_expert=is_expert) for is_expert in (False, True))
    for what, num in (("tokens", config.vocab_size), ("MLP columns", inner)):
        if num < size:
            raise ValueError(f"--tp-size {size} is more than the model's {num} {what}")


def _which(name: str) -> tuple[str, str]:
    """A module's own name, and which of its parameters this is."""
    layer, _, kind = name.rpartition(".")
    own = layer.rpartition(".")[2]
    return _OF_MIXTRAL.get(own, own), kind


def _is_of_expert(name: str) -> bool:
    return ".experts." in name


def _inner_size(config: ModelConfig, *, of_expert: bool) -> int:
    return config.experts.intermediate_size if of_expert and config.experts else config.intermediate_size


def _has_whole_kv_heads(num_kv_heads: int, size: int) -> bool:
    return num_kv_heads % size == 0 or size % num_kv_heads == 0


def _column_unit(total: int, size: int) -> int:
    """The largest unit whose shares are nearly even."""
    for unit in _COLUMN_UNITS:
        num_units = -(-total // unit)
        if total // unit >= size and -(-num_units // size) * unit <= _MOST_IMBALANCE * total / size:
            return unit
    return 1


def _token_unit(total: int, size: int) -> int:
    return next(unit for unit in _TOKEN_UNITS if unit == 1 or total // unit >= size)


def _features(heads: range, config: ModelConfig) -> range:
    return range(heads.start * config.head_dim, heads.stop * config.head_dim)


def _behind(rows: range, first: int) -> range:
    return range(first + rows.start, first + rows.stop)
