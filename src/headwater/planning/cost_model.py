"""The time of a step, from its FLOPs and bytes (Williams, Waterman, Patterson, "Roofline", 2009)."""

import numpy as np

from headwater.planning.hardware import Hardware
from headwater.planning.model_shape import ModelShape, check_ranks_of
from headwater.scheduling.plan import StepPlan

_SUM_BYTES = 2  # of a partial sum's element, in bfloat16


def check_ranks(model: ModelShape, hardware: Hardware, tp_size: int) -> None:
    """ValueError if `tp_size` ranks cannot share the model, or are not known on this hardware."""
    check_ranks_of(model, tp_size)
    if tp_size > 1 and not hardware.all_reduce_bytes_per_s:
        raise ValueError(f"tp-size {tp_size} needs all_reduce_bytes_per_s of the hardware; {hardware.name} has none")


class CostModel:
    """The time of steps of one model on `tp_size` devices. Linear layers, attention and sums do not overlap."""

    def __init__(self, model: ModelShape, hardware: Hardware, *, tp_size: int = 1) -> None:
        """ValueError if so many ranks cannot share the model, or are not known on this hardware."""
        check_ranks(model, hardware, tp_size)
        self._tp_size = tp_size
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
        """Seconds of a step that computes `num_tokens` and samples `num_samples`. Each rank computes its share.

        `num_read` counts the tokens whose KV is read, over all rows. `num_scores` counts the pairs of a computed
        token and a token that it attends to.
        """
        model, hardware, ranks = self._model, self._hardware, self._tp_size
        head = model.num_head_weights if num_samples else 0
        products_s = self._overlapped(
            (model.weight_bytes_read(num_tokens) + head * model.weight_bytes) / ranks / hardware.bytes_per_s,
            2 * (model.num_token_weights * num_tokens + head * num_samples) / ranks / hardware.flops_per_s,
        )
        attention_s = self._overlapped(
            num_read * model.rank_kv_bytes_per_token(ranks) / hardware.bytes_per_s,
            4 * model.num_layers * model.q_size * num_scores / ranks / hardware.attention_flops_per_s,
        )
        overhead_s = (
            hardware.step_overhead_s + num_rows * hardware.row_overhead_s + num_tokens * hardware.token_overhead_s
        )
        return products_s + attention_s + overhead_s + self.sums_s(num_tokens)

    def sums_s(self, num_tokens: float) -> float:
        """Seconds that the ranks take in a step to add up their partial sums, `2 * layers + 1` times."""
        if self._tp_size == 1:
            return 0.0
        num_bytes = num_tokens * self._model.hidden_size * _SUM_BYTES
        num_bytes *= 2 * (self._tp_size - 1) / self._tp_size  # each rank of a ring sends so much; of two: all once
        return (2 * self._model.num_layers + 1) * (
            self._hardware.all_reduce_latency_s + num_bytes / self._hardware.all_reduce_bytes_per_s
        )

    def _overlapped(self, bytes_s: float, flops_s: float) -> float:
        return max(bytes_s, flops_s) + (1 - self._hardware.overlap) * min(bytes_s, flops_s)
