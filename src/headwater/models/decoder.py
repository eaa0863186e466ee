"""The forward pass of all families that registry.py names, over a device's layers and attention.

The families differ in optional parameters and in numbers of the config, so one model serves them all. The residual
stream is float32 in every dtype: it costs little and keeps bfloat16 sums from drifting. The model looks into no array:
a GPU's hold numbers, a CPU's stand for those of the steps to come (cpu/program.py).

Where blocks add a multiple of their results, the stream is kept divided by that number: sums need no further product,
and norms, which divide it out again, have a smaller epsilon.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from headwater.devices.adapters import StepAdapters
from headwater.devices.device import (
    Array,
    AttentionGeometry,
    Experts,
    GatedLinear,
    Layer,
    LayerAttention,
    Linear,
    ModelDevice,
    RotaryAngles,
    SharedNorm,
    StepAttention,
)
from headwater.models.config import ModelConfig
from headwater.models.experts.mlp import ExpertsMlp, Mlp
from headwater.models.ranks.share import ModelShare


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One transformer layer with its projections fused as the device computes them. `norms` are by their names."""

    norms: dict[str | None, Array]
    qkv: Linear
    q_norm: Array | None
    k_norm: Array | None
    sinks: Array | None
    o: Linear
    mlp: Mlp


@dataclass(frozen=True, slots=True)
class _Reader:
    """What reads the residual stream next: its norm, and the layer that alone reads the result, if there is one.

    `like` is a parameter, where the block has no norm before it.
    """

    norm: Array | None
    like: Array | None
    layer: Layer | None


class DecoderModel:
    """A causal language model whose parameters are packed for one device: its rank's share of them.

    `head` is also the embedding if the model has one matrix for both (tied). `config` is that of the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: ModelDevice,
        *,
        embedding: Linear,
        layers: list[DecoderLayer],
        norm: Array,
        head: Linear,
    ) -> None:
        self.config = config
        self._names = frozenset(config.parameter_shapes())
        self._qkv_names = config.qkv_names
        self._gate_up_names = config.gate_up_names
        self.share = share = ModelShare.of(device.ranks)
        ropes = [config.rope_of(index) for index in range(config.num_layers)]
        self._ropes = list(dict.fromkeys(ropes))
        self.geometry = AttentionGeometry(
            num_heads=len(share.heads(config)),
            num_kv_heads=len(share.kv_heads(config)),
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            score_scale=config.score_scale,
            layers=tuple(
                LayerAttention(rotary=self._ropes.index(rope), window=config.window_of(index))
                for index, rope in enumerate(ropes)
            ),
            norm_offset=config.norm_offset,
            norms_whole=config.qk_norm_whole,
            shared_norm=_shared_norm(config, share),
            rotary_pairs=config.rotary_pairs,
            is_interleaved=config.is_interleaved,
            has_sinks=config.has_sinks,
        )
        self._eps = config.norm_eps / config.residual_scale**2
        self._device = device
        self.embedding = embedding
        self.layers = layers
        self._norm = norm
        self.head = head

    @property
    def rotary(self) -> list[RotaryAngles]:
        """The angles by which the model's attention rotates queries and keys: `rotary` of its layers counts them."""
        head_dim = self.config.head_dim
        return [
            RotaryAngles(np.zeros(head_dim // 2, dtype=np.float32), 1.0)
            if rope is None
            else RotaryAngles(rope.inv_freq(head_dim), rope.attention_factor)
            for rope in self._ropes
        ]

    def forward(self, token_ids: Array, attention: StepAttention, adapters: StepAdapters | None = None) -> Array:
        """Hidden states before the last norm. Ids [T] -> float32[T, hidden_size]. `adapters`: those of the tokens."""
        device, config = self._device, self.config
        first_token = None if self.share.size == 1 else self.share.tokens(config).start
        scale = config.embedding_scale / config.residual_scale
        residual = device.all_reduce(self.embedding.embed(token_ids, first_token=first_token, scale=scale))
        is_plain = adapters is not None  # they read what the layers read
        x = self._input(residual, self._attention_reader(0, is_plain))
        for index, layer in enumerate(self.layers):
            after_attention, after_mlp = (
                layer.norms.get(name) for name in (config.norms.after_attention, config.norms.after_mlp)
            )
            if adapters is None:
                qkv = layer.qkv(x, reader=attention)
            else:
                qkv = layer.qkv(x)
                adapters.add("qkv", index, x, qkv)
            x = attention(qkv, index, layer.q_norm, layer.k_norm, layer.sinks)
            to = self._mlp_reader(layer, is_plain)
            x = self._add("o", index, layer.o, residual=residual, x=x, adapters=adapters, norm=after_attention, to=to)
            to = self._attention_reader(index + 1, is_plain)
            if isinstance(layer.mlp, ExpertsMlp):
                x = self._add_experts(layer.mlp, residual, x, norm=after_mlp, to=to)
                continue
            gate_up, down = layer.mlp.gate_up, layer.mlp.down
            x = gate_up(x, reader=down) if adapters is None else adapters.gated(index, gate_up, x)
            x = self._add("down", index, down, residual=residual, x=x, adapters=adapters, norm=after_mlp, to=to)
        return residual

    def _attention_reader(self, index: int, is_plain: bool) -> _Reader | None:
        """None behind the last layer. `is_plain`: the layer is not alone in reading."""
        if index == len(self.layers):
            return None
        layer, names = self.layers[index], self.config.norms
        norm, like = layer.norms.get(names.before_attention), layer.norms.get(names.after_attention)
        return _Reader(norm, like, None if is_plain else layer.qkv)

    def _mlp_reader(self, layer: DecoderLayer, is_plain: bool) -> _Reader:
        names = self.config.norms
        norm, like = layer.norms.get(names.before_mlp), layer.norms.get(names.after_mlp)
        block = layer.mlp.experts if isinstance(layer.mlp, ExpertsMlp) else layer.mlp.gate_up
        return _Reader(norm, like, None if is_plain else block)

    def _input(self, residual: Array, to: _Reader | None) -> Array | None:
        """What is read of the residual stream next."""
        if to is None:
            return None
        if to.norm is None:
            return self._device.without_norm(residual, to.like)
        return self._device.rms_norm(residual, to.norm, self._eps, offset=self.config.norm_offset, reader=to.layer)

    def _add_block(
        self, block: Linear | Experts, residual: Array, inputs: Sequence[Array], to: _Reader | None
    ) -> Array | None:
        """Add a block's whole result to the residual. Returns what is read of it next."""
        if to is None or to.norm is None:
            block.add_to(residual, *inputs)
            return self._input(residual, to)
        offset = self.config.norm_offset
        return self._device.add_and_norm(
            block, residual, inputs, to.norm, self._eps, offset=offset, reader=to.layer
        )

    def _add_normed(self, residual: Array, y: Array, norm: Array) -> None:
        """Add a block's result, of which the ranks have a part of the sum, behind its own norm."""
        config = self.config
        self._device.add_rms_norm(
            residual, self._device.all_reduce(y), norm, config.norm_eps, offset=config.norm_offset
        )

    def _add_experts(
        self, mlp: ExpertsMlp, residual: Array, x: Array, *, norm: Array | None, to: _Reader | None
    ) -> Array | None:
        """Adapters of experts are refused when they are loaded."""
        if norm is not None:
            self._add_normed(residual, mlp(x), norm)
        elif self.share.size == 1:
            return self._add_block(mlp.experts, residual, mlp.inputs(x), to)
        else:
            self._device.add_reduced(residual, mlp(x))
        return self._input(residual, to)

    def _add(
        self,
        site: str,
        index: int,
        linear: Linear,
        *,
        residual: Array,
        x: Array,
        adapters: StepAdapters | None,
        norm: Array | None,
        to: _Reader | None,
    ) -> Array | None:
        """Add a product whose inputs the ranks share to the residual, and the product of the adapters.

        `norm`: of the sum of both, before it is added. Returns what is read of the residual next.
        """
        if self.share.size == 1 and norm is None:
            if adapters is None:
                return self._add_block(linear, residual, (x,), to)
            linear.add_to(residual, x)
            adapters.add(site, index, x, residual)
            return self._input(residual, to)
        y = linear(x)
        if adapters is not None:
            adapters.add(site, index, x, y)  # its part of the sum over the ranks, as the model's own
        if norm is None:
            self._device.add_reduced(residual, y)
        else:
            self._add_normed(residual, y, norm)
        return self._input(residual, to)

    def last_norm(self, hidden: Array) -> Array:
        """The norm behind the last layer: what the head reads, and what embeddings are pooled from."""
        return self._device.rms_norm(hidden, self._norm, self._eps, offset=self.config.norm_offset)

    def logits(self, hidden: Array, out: Array | None = None, *, normed: Array | None = None) -> Array:
        """float32[N, hidden_size] -> float32[N, vocab_size], in `out` if given; of the share's tokens alone.

        `normed` is the last norm of `hidden`, where the caller has it.
        """
        divisor = self.config.logits_divisor
        if normed is None or divisor != 1.0:
            offset = self.config.norm_offset
            normed = self._device.rms_norm(hidden, self._norm, self._eps, offset=offset, scale=1.0 / divisor)
        return self.head.logits(normed, out)

    def replace_outer(self, embedding: Linear, *, norm: Array, head: Linear) -> None:
        """Put other parameters before and after the layers."""
        self.embedding, self._norm, self.head = embedding, norm, head

    def get_by_name(self, name: str) -> Array:
        """One parameter by its Hugging Face checkpoint name, or the share of it. KeyError if unknown.

        The caller must not change it.
        """
        if name in self._names:
            parts = name.split(".")
            mlp = self.layers[int(parts[2])].mlp if "layers" in parts else None
            if isinstance(mlp, ExpertsMlp) and parts[3] not in (*self.config.norms.names, "self_attn"):
                assert self.config.experts is not None
                return mlp.get_by_name(self.config.experts, name)
            found = self._layer_parameters(int(parts[2]), parts[3]) if "layers" in parts else self._outer_parameters()
            for parameter, array in found:
                if parameter == name:
                    return array
        raise KeyError(name)

    def iter_named(self) -> Iterator[tuple[str, Array]]:
        """Every parameter with its Hugging Face checkpoint name, unpacked one layer at a time."""
        outer = self._outer_parameters()
        yield next(outer)
        for index in range(len(self.layers)):
            for block in self.config.norms.blocks:
                yield from self._layer_parameters(index, block)
        yield from outer

    def _outer_parameters(self) -> Iterator[tuple[str, Array]]:
        """The parameters before and after the layers; the embedding comes first."""
        yield from _named("model.embed_tokens", self.embedding)
        yield "model.norm.weight", self._norm
        if not self.config.tie_word_embeddings:
            yield from _named("lm_head", self.head)

    def _layer_parameters(self, index: int, block: str) -> Iterator[tuple[str, Array]]:
        """The parameters of one block of one layer: a norm, `self_attn` or `mlp`."""
        layer = self.layers[index]
        prefix = f"model.layers.{index}.{block}."
        if block in layer.norms:
            yield prefix + "weight", layer.norms[block]
        elif block == "self_attn":
            yield from _named(prefix, layer.qkv, self._qkv_names)
            if layer.q_norm is not None and layer.k_norm is not None:
                yield prefix + "q_norm.weight", layer.q_norm
                yield prefix + "k_norm.weight", layer.k_norm
            yield from _named(prefix, layer.o, ("o_proj",))
            if layer.sinks is not None:
                yield prefix + "sinks", layer.sinks
        elif isinstance(layer.mlp, ExpertsMlp):
            assert self.config.experts is not None
            yield from layer.mlp.iter_named(self.config.experts, index)
        else:
            yield from _named(prefix, layer.mlp.gate_up, self._gate_up_names)
            yield from _named(prefix, layer.mlp.down, ("down_proj",))


def _shared_norm(config: ModelConfig, share: ModelShare) -> SharedNorm | None:
    if share.size == 1 or not config.qk_norm_whole:
        return None
    return SharedNorm(config.num_heads, config.num_kv_heads, counts_keys=share.owns_kv_heads(config))


def _named(prefix: str, packed: Linear | GatedLinear, names: Sequence[str] = ("",)) -> Iterator[tuple[str, Array]]:
    """The layers that were packed into one, each under its name."""
    for name, (weight, bias) in zip(names, packed.unpack(), strict=True):
        yield f"{prefix}{name}.weight", weight
        if bias is not None:
            yield f"{prefix}{name}.bias", bias
