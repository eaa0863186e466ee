"""Models out of packed layers: new ones, those that keep the layers of another, and changes of a model itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from headwater.devices.device import Array, GatedLinear, Linear, ModelDevice, Routing
from headwater.models.config import ModelConfig
from headwater.models.decoder import DecoderLayer, DecoderModel
from headwater.models.experts.config import ExpertsConfig
from headwater.models.experts.mlp import DenseMlp, ExpertsMlp, Mlp
from headwater.models.weights import LayerSource


@dataclass(frozen=True, slots=True)
class Base:
    """A model whose packed layers are taken over where none of their parameters is among `replaced`."""

    model: DecoderModel
    replaced: frozenset[str]

    def keeps(self, names: Sequence[str]) -> bool:
        return self.replaced.isdisjoint(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


class _Builder:
    """Reads a model's parameters one fused layer at a time, so that little more than the model is ever in memory.

    The shapes must have been checked (weights.check_shapes).
    """

    def __init__(self, config: ModelConfig, source: LayerSource, base: Base | None) -> None:
        self._config = config
        self._source = source
        self._base = base

    def layer(self, index: int) -> DecoderLayer:
        config, load, linear = self._config, self._source.load, self._linear
        prefix = f"model.layers.{index}."
        attn = prefix + "self_attn."
        qkv = [attn + name for name in config.qkv_names]
        return DecoderLayer(
            norms={name: load(f"{prefix}{name}.weight") for name in config.norms.names},
            qkv=linear(qkv, lambda model: model.layers[index].qkv, has_bias=config.qkv_bias),
            q_norm=load(attn + "q_norm.weight") if config.qk_norm else None,
            k_norm=load(attn + "k_norm.weight") if config.qk_norm else None,
            sinks=load(attn + "sinks") if config.has_sinks else None,
            o=linear([attn + "o_proj"], lambda model: model.layers[index].o, has_bias=config.o_bias),
            mlp=self._mlp(index),
        )

    def _mlp(self, index: int) -> Mlp:
        config = self._config
        if config.experts is not None and index not in config.experts.dense_layers:
            return self._experts(index, config.experts)
        mlp = f"model.layers.{index}.mlp."
        gate_up = [mlp + name for name in config.gate_up_names]
        down = [mlp + "down_proj"]
        return DenseMlp(
            gate_up=self._gated_linear(gate_up, lambda model: _mlp_of(model, index, DenseMlp).gate_up),
            down=self._linear(down, lambda model: _mlp_of(model, index, DenseMlp).down, has_bias=config.mlp_bias),
        )

    def _experts(self, index: int, experts: ExpertsConfig) -> ExpertsMlp:
        """The router is never quantised: it is small, and a token that goes to other experts is another token."""
        router, matrices = experts.router(index), experts.matrices(index)
        base = self._base
        if base is not None and base.keeps([name for each in matrices for name in each]):
            packed = _mlp_of(base.model, index, ExpertsMlp).experts
        else:
            routing = Routing(experts.per_token, experts.renormalises)
            packed = self._source.experts(
                matrices, routing, has_bias=experts.has_bias, activation=experts.activation
            )
        of_base = None if base is None or not base.keeps([router]) else _mlp_of(base.model, index, ExpertsMlp).router
        return ExpertsMlp(
            of_base or self._source.linear([router], has_bias=experts.has_bias, stays_plain=True), packed
        )

    def embedding(self) -> Linear:
        return self._linear(["model.embed_tokens"], lambda model: model.embedding)

    def norm(self) -> Array:
        return self._source.load("model.norm.weight")

    def head(self, embedding: Linear) -> Linear:
        if self._config.tie_word_embeddings:
            return embedding
        return self._linear(["lm_head"], lambda model: model.head)

    def _linear(
        self, names: Sequence[str], of_base: Callable[[DecoderModel], Linear], *, has_bias: bool = False
    ) -> Linear:
        if self._base is not None and self._base.keeps(names):
            return of_base(self._base.model)
        return self._source.linear(names, has_bias=has_bias)

    def _gated_linear(self, names: Sequence[str], of_base: Callable[[DecoderModel], GatedLinear]) -> GatedLinear:
        if self._base is not None and self._base.keeps(names):
            return of_base(self._base.model)
        config = self._config
        return self._source.gated_linear(names, has_bias=config.mlp_bias, activation=config.activation)


_AnyMlp = TypeVar("_AnyMlp", DenseMlp, ExpertsMlp)


def _mlp_of(model: DecoderModel, index: int, kind: type[_AnyMlp]) -> _AnyMlp:
    """The MLP of a layer of a model of the same config."""
    mlp = model.layers[index].mlp
    assert isinstance(mlp, kind)
    return mlp


def build_decoder(
    config: ModelConfig, source: LayerSource, device: ModelDevice, *, base: Base | None = None
) -> DecoderModel:
    """A model of the parameters of `source`, and of the layers of `base` that it keeps."""
    build = _Builder(config, source, base)
    layers = [build.layer(index) for index in range(config.num_layers)]
    embedding = build.embedding()
    return DecoderModel(
        config, device, embedding=embedding, layers=layers, norm=build.norm(), head=build.head(embedding)
    )


def copy_decoder(model: DecoderModel, source: DecoderModel, device: ModelDevice) -> bool:
    """Put the parameters of `source` into the memory of `model`. False if the device does without: nothing was done."""
    return device.overwrite(
        (array, new) for (_, array), (_, new) in zip(model.iter_named(), source.iter_named(), strict=True)
    )


def overwrite_decoder(model: DecoderModel, source: LayerSource, *, replaced: frozenset[str]) -> None:
    """Put the `replaced` parameters into the model itself: at most one layer exists twice meanwhile.

    No step may compute with the model. If this raises, the model is neither the old nor the new one.
    """
    build = _Builder(model.config, source, Base(model, replaced))
    for index in range(len(model.layers)):
        model.layers[index] = build.layer(index)
    model.replace_outer(embedding := build.embedding(), norm=build.norm(), head=build.head(embedding))
