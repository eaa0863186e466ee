"""Steps that wait, layer by layer, for arriving pages."""

from collections.abc import Sequence

import torch

from headwater.devices.cuda.arrivals import Arrival
from headwater.devices.device import StepAttention

_MAX_GATES = 8


class LayerGates:
    """Waits before some layers of a step. A CUDA graph can contain them.

    A gate is an event. Before each step that has to wait, it is recorded again, behind the part of every arrival that
    the layers up to the next gate read. A graph waits for what was recorded last before its launch.
    """

    def __init__(self, num_layers: int, *, device: torch.device) -> None:
        self._num_layers = num_layers
        self._size = -(-num_layers // _MAX_GATES)
        self._events: dict[int, torch.cuda.Event] = {}
        if device.type == "cuda":  # on a CPU, work is done when it is launched
            self._stream = torch.cuda.Stream(device)
            for layer in range(0, num_layers, self._size):
                self._events[layer] = torch.cuda.Event(external=True)
                self._events[layer].record(self._stream)

    def follow(self, arrivals: Sequence[Arrival]) -> None:
        """Make the steps that are launched until the next call wait for `arrivals`. Never blocks."""
        if not arrivals or not self._events:
            return
        with torch.cuda.stream(self._stream):
            for layer, event in self._events.items():
                for arrival in arrivals:
                    arrival.hold_up(min(layer + self._size, self._num_layers) - 1)
                event.record()

    def hold_up(self, layer: int) -> None:
        """Make what is launched from now on wait at the gate before `layer`, if there is one."""
        if layer in self._events:
            torch.cuda.current_stream().wait_event(self._events[layer])


class GatedAttention:
    """`device.StepAttention` of a step that may read arriving pages: each layer waits at its gate."""

    def __init__(self, attention: StepAttention, gates: LayerGates) -> None:
        self._attention = attention
        self._gates = gates

    @property
    def reads_unscaled(self) -> bool:
        return False  # steps with prompts, whose keys and queries another kernel writes

    def __call__(
        self,
        qkv: torch.Tensor,
        layer: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._gates.hold_up(layer)
        return self._attention(qkv, layer, q_norm, k_norm, sinks)
