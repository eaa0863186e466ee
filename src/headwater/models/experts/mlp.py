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

    def add_to(self, residual: Array, x: Array) -> None:
        self.experts.add_to(residual, x, self.router.logits(x))

    def __call__(self, x: Array) -> Array:
        """A rank's part of what is added to the residual."""
        return self.experts(x, self.router.logits(x))

    def iter_named(self, config: ExpertsConfig, layer: int) -> Iterator[tuple[str, Array]]:
        """Every parameter under its checkpoint name, one matrix unpacked at a time."""
        ((router, _),) = self.router.unpack()
        yield config.router(layer) + ".weight", router
        for expert, names in enumerate(config.matrices(layer)):
            for which, name in enumerate(names):
                yield name + ".weight", self.experts.matrix(expert, which)

    def get_by_name(self, config: ExpertsConfig, name: str) -> Array:
        """One parameter of this layer."""
        place = config.place_of(name)
        if place is None:
            ((router, _),) = self.router.unpack()
            return router
        return self.experts.matrix(*place)


Mlp = DenseMlp | ExpertsMlp
