"""A layer of experts on a CPU without kernels (device.Experts): records one op, which computes in numpy."""

from collections.abc import Iterable
from functools import partial

from headwater.devices.cpu.kernel_library import TOKENS
from headwater.devices.cpu.plain.experts import experts, route
from headwater.devices.cpu.plain.linear import Floats
from headwater.devices.cpu.program import Array, StepArrays
from headwater.devices.device import Activation, ExpertBiases, Routing
from headwater.devices.host_tensor import HostTensor

Expert = tuple[HostTensor, HostTensor, HostTensor]  # gate, up, down


class PlainExperts:
    """Experts in the format that they were placed in; one is widened at a time."""

    def __init__(
        self,
        experts: Iterable[Expert],
        *,
        routing: Routing,
        biases: ExpertBiases | None = None,
        activation: Activation = "silu",
    ) -> None:
        self._experts = list(experts)
        self._routing = routing
        self._biases = biases
        self._activation: Activation = activation

    def __call__(self, x: Array, logits: Array) -> Array:
        y = x.program.array(TOKENS, x.width)
        x.program.append("experts", None, {"x": x, "logits": logits, "y": y}, plain=partial(_store, layer=self))
        return y

    def add_to(self, residual: Array, x: Array, logits: Array) -> None:
        x.program.append("experts", None, {"x": x, "logits": logits, "y": residual}, plain=partial(_add, layer=self))

    def matrix(self, expert: int, which: int) -> HostTensor:
        return self._experts[expert][which]

    def bias(self, expert: int, which: int) -> HostTensor:
        assert self._biases is not None
        return self._biases[expert][which]

    def compute(self, x: Floats, logits: Floats) -> Floats:
        """The weighted sum of the experts of each row."""
        chosen, weights = route(logits, self._routing.per_token, renormalises=self._routing.renormalises)

        def matrix(expert: int, which: int) -> Floats:
            return self.matrix(expert, which).to_float32()

        def bias(expert: int, which: int) -> Floats:
            return self.bias(expert, which).to_float32()

        return experts(
            x,
            chosen,
            weights,
            matrix=matrix,
            num_experts=len(self._experts),
            bias=None if self._biases is None else bias,
            activation=self._activation,
        )


# --- in numpy (program.Plain) ------------------------------------------------------------------------


def _store(_: StepArrays, *, x: Floats, logits: Floats, y: Floats, layer: PlainExperts) -> None:
    y[:] = layer.compute(x, logits)


def _add(_: StepArrays, *, x: Floats, logits: Floats, y: Floats, layer: PlainExperts) -> None:
    y += layer.compute(x, logits)
