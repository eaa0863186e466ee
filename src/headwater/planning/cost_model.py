"""The time of a step, from its FLOPs and bytes (Williams, Waterman, Patterson, "Roofline", 2009)."""

import numpy as np

from headwater.planning.hardware import Hardware
from headwater.planning.model_shape import ModelShape
from headwater.scheduling.plan import StepPlan


class CostModel:
    """The time of steps of one model on one device. Linear layers and attention do not overlap."""

    def __init__(self, model: ModelShape, hardware: Hardware) -> None:
        self._model = model
        self._hardware = hardware

    def step_s(self, plan: StepPlan) -> float:
        """Seconds of a step on the device."""
        computed = plan.num_computed.astype(np.float64)
        tokens = plan.num_tokens.astype(np.float64)
        return self.seconds(
            num_tokens=float(tokens.sum()),
            num_rows=plan.num_rows,
            num_samples=int(plan.samples.sum()),
            num_read=float((computed + tokens).sum()),
            num_scores=float((tokens * computed + tokens * (tokens + 1) / 2).sum()),
        )

    def seconds(
        self, *, num_tokens: float, num_rows: int, num_samples: int, num_read: float, num_scores: float
    ) -> float:
        """Seconds of a step that computes `num_tokens` and samples `num_samples`.

        `num_read` counts the tokens whose KV is read, over all rows. `num_scores` counts the pairs of a computed
        token and a token that it attends to.
        """
        model, hardware = self._model, self._hardware
        head = model.num_head_weights if num_samples else 0
        products_s = self._overlapped(
            (model.num_layer_weights + head) * model.weight_bytes / hardware.bytes_per_s,
            2 * (model.num_layer_weights * num_tokens + head * num_samples) / hardware.flops_per_s,
        )
        attention_s = self._overlapped(
            num_read * model.kv_bytes_per_token / hardware.bytes_per_s,
            4 * model.num_layers * model.q_size * num_scores / hardware.attention_flops_per_s,
        )
        overhead_s = (
            hardware.step_overhead_s + num_rows * hardware.row_overhead_s + num_tokens * hardware.token_overhead_s
        )
        return products_s + attention_s + overhead_s

    def _overlapped(self, bytes_s: float, flops_s: float) -> float:
        return max(bytes_s, flops_s) + (1 - self._hardware.overlap) * min(bytes_s, flops_s)
