"""The forward pass of the Llama, Mistral, Qwen2 and Qwen3 families, over a device's layers and attention.

The families differ in optional parameters only (biases, QK-norm), so one model serves them all. The residual
stream is float32 in every dtype: it costs little and keeps bfloat16 sums from drifting.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headwater.devices.device import Array, AttentionGeometry, GatedLinear, Linear, ModelDevice, StepAttention
from headwater.models.config import ModelConfig
from headwater.models.weights import PlacedWeights


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One transformer layer with its projections fused as the device computes them."""

    input_norm: Array
    qkv: Linear
    q_norm: Array | None
    k_norm: Array | None
    o: Linear
    post_attention_norm: Array
    gate_up: GatedLinear
    down: Linear


class DecoderModel:
    """A causal language model whose parameters are packed for one device.

    `embedding` is None if the head's matrix is also the embedding (tied).
    """

    def __init__(
        self,
        config: ModelConfig,
        device: ModelDevice,
        *,
        embedding: Array | None,
        layers: list[DecoderLayer],
        norm: Array,
        head: Linear,
    ) -> None:
        self.config = config
        self.geometry = AttentionGeometry(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
        )
        self._device = device
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._inv_freq = torch.from_numpy(config.rope.inv_freq(config.head_dim)).to(device.torch_device)

    @property
    def dtype(self) -> torch.dtype:
        return self._norm.dtype

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the positions' angles. int[T] -> two of float32[T, head_dim / 2]."""
        angles = positions.to(torch.float32)[:, None] * self._inv_freq
        factor = self.config.rope.attention_factor
        return angles.cos() * factor, angles.sin() * factor

    def forward(self, token_ids: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        """Hidden states before the last norm. int64[T] -> float32[T, hidden_size]."""
        device, eps = self._device, self.config.norm_eps
        residual = self._embed(token_ids).float()
        for index, layer in enumerate(self._layers):
            x = device.rms_norm(residual, layer.input_norm, eps)
            x = attention(layer.qkv(x), index, layer.q_norm, layer.k_norm)
            layer.o.add_to(residual, x)
            x = device.rms_norm(residual, layer.post_attention_norm, eps)
            layer.down.add_to(residual, layer.gate_up(x))
        return residual

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32[N, hidden_size] -> float32[N, vocab_size], in `out` if given."""
        return self._head.logits(self._device.rms_norm(hidden, self._norm, self.config.norm_eps), out)

    def get_by_name(self, name: str) -> Array:
        """One parameter by its Hugging Face checkpoint name; the caller must not change it. KeyError if unknown."""
        if name in self.config.parameter_shapes():
            top = {"model.embed_tokens.weight": self._embed_weight, "model.norm.weight": lambda: self._norm}
            if name in top:
                return top[name]()
            if name == "lm_head.weight":
                return self._head.unpack()[0]
            _, _, index, block, *_ = name.split(".")
            for found, tensor in self._layer_parameters(int(index), block):
                if found == name:
                    return tensor
        raise KeyError(name)

    def iter_named(self) -> Iterator[tuple[str, Array]]:
        """Every parameter with its Hugging Face checkpoint name, unpacked one layer at a time."""
        yield "model.embed_tokens.weight", self._embed_weight()
        for index in range(len(self._layers)):
            for block in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
                yield from self._layer_parameters(index, block)
        yield "model.norm.weight", self._norm
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self._head.unpack()[0]

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._embedding is None:
            return self._head.rows(token_ids)
        return torch.nn.functional.embedding(token_ids, self._embedding)

    def _embed_weight(self) -> Array:
        return self._head.unpack()[0] if self._embedding is None else self._embedding

    def _layer_parameters(self, index: int, block: str) -> Iterator[tuple[str, Array]]:
        """The parameters of one block of one layer: a norm, `self_attn` or `mlp`."""
        layer, config = self._layers[index], self.config
        prefix = f"model.layers.{index}.{block}."
        if block == "input_layernorm":
            yield prefix + "weight", layer.input_norm
        elif block == "post_attention_layernorm":
            yield prefix + "weight", layer.post_attention_norm
        elif block == "self_attn":
            sizes = (config.q_size, config.kv_size, config.kv_size)
            weight, bias = layer.qkv.unpack()
            weights = weight.split(sizes)
            biases = (None, None, None) if bias is None else bias.split(sizes)
            for name, part, part_bias in zip("qkv", weights, biases, strict=True):
                yield from _named(f"{prefix}{name}_proj", part, part_bias)
            yield from _norms(prefix, layer)
            yield from _named(prefix + "o_proj", *layer.o.unpack())
        else:
            gate, up, gate_bias, up_bias = layer.gate_up.unpack()
            yield from _named(prefix + "gate_proj", gate, gate_bias)
            yield from _named(prefix + "up_proj", up, up_bias)
            yield from _named(prefix + "down_proj", *layer.down.unpack())


def build_decoder(config: ModelConfig, source: PlacedWeights, device: ModelDevice) -> DecoderModel:
    """Read the parameters one fused layer at a time, so that little more than the model is ever in memory.

    The shapes must have been checked (weights.check_shapes).
    """

    load = source.load

    def load_all(prefix: str, names: tuple[str, ...], kind: str) -> list[Array]:
        return [load(f"{prefix}{name}_proj.{kind}") for name in names]

    def linear(prefix: str, names: tuple[str, ...], *, has_bias: bool) -> Linear:
        biases = load_all(prefix, names, "bias") if has_bias else None
        return device.pack_linear(load_all(prefix, names, "weight"), biases)

    def layer(index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}."
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        gate, up = load_all(mlp, ("gate", "up"), "weight")
        gate_bias, up_bias = load_all(mlp, ("gate", "up"), "bias") if config.mlp_bias else (None, None)
        return DecoderLayer(
            input_norm=load(prefix + "input_layernorm.weight"),
            qkv=linear(attn, ("q", "k", "v"), has_bias=config.qkv_bias),
            q_norm=load(attn + "q_norm.weight") if config.qk_norm else None,
            k_norm=load(attn + "k_norm.weight") if config.qk_norm else None,
            o=linear(attn, ("o",), has_bias=config.o_bias),
            post_attention_norm=load(prefix + "post_attention_layernorm.weight"),
            gate_up=device.pack_gated_linear(gate, up, gate_bias=gate_bias, up_bias=up_bias),
            down=linear(mlp, ("down",), has_bias=config.mlp_bias),
        )

    layers = [layer(index) for index in range(config.num_layers)]
    embedding = load("model.embed_tokens.weight")
    tied = config.tie_word_embeddings
    return DecoderModel(
        config,
        device,
        embedding=None if tied else embedding,
        layers=layers,
        norm=load("model.norm.weight"),
        head=device.pack_linear([embedding if tied else load("lm_head.weight")]),
    )


def _named(prefix: str, weight: Array, bias: Array | None) -> Iterator[tuple[str, Array]]:
    yield prefix + ".weight", weight
    if bias is not None:
        yield prefix + ".bias", bias


def _norms(prefix: str, layer: DecoderLayer) -> Iterator[tuple[str, Array]]:
    if layer.q_norm is not None and layer.k_norm is not None:
        yield prefix + "q_norm.weight", layer.q_norm
        yield prefix + "k_norm.weight", layer.k_norm
