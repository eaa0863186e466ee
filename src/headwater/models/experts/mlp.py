"""The second half of a layer: one gated MLP for all tokens, or a router and experts."""

from collections.abc import Iterator
from dataclasses import dataclass

from headwater.devices.device import Array, Experts, GatedLinear, Linear
from headwater.models.experts.config import ExpertsConfig


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """down(activation(gate(x)) * up(x)), the products of gate and up fused."""

    gate_up: GatedLinear
    down: Linear


@dataclass(frozen=True, slots=True)
class ExpertsMlp:
    """The router's logits, and the sum of the experts that they choose."""

    router: Linear
    experts: Experts

    def inputs(self, x: Array) -> tuple[Array, Array]:
        """What the experts are called with."""
        return x, self.router.logits(x)

    def __call__(self, x: Array) -> Array:
        """A rank's part of what is added to the residual."""
        return self.experts(*self.inputs(x))

    def iter_named(self, config: ExpertsConfig, layer: int) -> Iterator[tuple[str, Array]]:
        """Every parameter under its checkpoint name, one matrix unpacked at a time."""
        ((router, bias),) = self.router.unpack()
        yield config.router(layer) + ".weight", router
        if bias is not None:
            yield config.router(layer) + ".bias", bias
        for expert, names in enumerate(config.matrices(layer)):
            for which, name in enumerate(names):
                yield name + ".weight", self.experts.matrix(expert, which)
                if config.has_bias:
                    yield name + ".bias", self.experts.bias(expert, which)

    def get_by_name(self, config: ExpertsConfig, name: str) -> Array:
        """One parameter of this layer."""
        place, is_bias = config.place_of(name), name.endswith(".bias")
        if place is None:
            ((router, bias),) = self.router.unpack()
            return bias if is_bias else router
        return self.experts.bias(*place) if is_bias else self.experts.matrix(*place)


Mlp = DenseMlp | ExpertsMlp
