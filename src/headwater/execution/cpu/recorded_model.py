"""A model as a CPU's program, with the logits of all ranks where several compute it."""

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.adapters.memory import CpuAdapters
from headwater.devices.cpu.adapters.recorded import RecordedAdapters
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.experts.jobs import ExpertsJob
from headwater.devices.cpu.packed_weights import PackedWeights, part_of_stack
from headwater.devices.cpu.program import StepArrays
from headwater.devices.cpu.ranks.ops import GatheredLogits
from headwater.devices.cpu.row_ops import MostProbable, argmax, select_rows
from headwater.devices.kv_memory import KVLayout
from headwater.models.decoder import DecoderModel
from headwater.models.ranks.share import ModelShare


class RecordedModel:
    """The program of one model over KV pages of one layout.

    Its first ops compute the hidden states of all tokens, the others the logits of the selected ones.
    """

    def __init__(
        self, model: DecoderModel, device: CpuDevice, *, layout: KVLayout, adapters: CpuAdapters | None = None
    ) -> None:
        self.program = program = device.start_program()
        attention = device.record_attention(program, model.geometry, layout, rotary=model.rotary)
        recorded = None if adapters is None else RecordedAdapters(program, adapters)
        hidden = program.keep(model.forward(program.token_ids, attention, recorded))
        self._num_forward_ops = len(program.ops)
        selected = select_rows(hidden)
        self._normed = program.keep(model.last_norm(selected))
        self._num_norm_ops = len(program.ops)
        self._logits = program.keep(model.logits(selected, normed=self._normed))
        self._best = MostProbable(*(program.keep(it) for it in argmax(self._logits)))
        self._gathered: GatheredLogits | None = None
        if device.cpu_ranks is not None:
            firsts = [ModelShare(rank, model.share.size).tokens(model.config).start for rank in range(model.share.size)]
            self._gathered = GatheredLogits(
                self._logits, self._best, device.cpu_ranks, firsts=firsts, vocab_size=model.config.vocab_size
            )
        device.finish_program(program)

    @property
    def packed_weights(self) -> list[PackedWeights]:
        """The matrices that a step of one row reads, packed; none without kernels. Of experts as many as it reads."""
        found = []
        for op in self.program.ops:
            if op.kernel not in ("linear", "linear_without_adapters", "experts"):
                continue
            for kept in op.keeps:
                if isinstance(kept, PackedWeights):
                    num = op.job.per_token if isinstance(op.job, ExpertsJob) else 0
                    found.append(part_of_stack(kept, 0, num) if num else kept)
        return found

    def run(self, step: StepArrays, *, needs_logits: bool = True) -> None:
        """Compute all of a step: keys and values to their pages, and what `logits` and `most_probable` return.

        Without `needs_logits`, which all ranks must choose alike, `logits` may return anything.
        """
        self._gather(needs_logits)
        self.program.run(step, end=None if len(step.selected) else self._num_forward_ops)

    def run_logits(self, step: StepArrays, *, needs_logits: bool = True) -> None:
        """Compute the logits of other selected tokens of the step that was run last."""
        self._gather(needs_logits)
        self.program.run(step, first=self._num_forward_ops)

    def _gather(self, needs_logits: bool) -> None:
        if self._gathered is not None:
            self._gathered.is_whole = needs_logits

    def run_norm(self, step: StepArrays) -> npt.NDArray[np.float32]:
        """Hidden states of other selected tokens of the step that was run last, after the last norm. [S, hidden_size]

        A view that the next run overwrites.
        """
        self.program.run(step, first=self._num_forward_ops, end=self._num_norm_ops)
        return self.program.view(self._normed, step)

    def logits(self, step: StepArrays) -> npt.NDArray[np.float32]:
        """float32[S, vocab_size], a view that the next run overwrites."""
        if self._gathered is not None:
            return self._gathered.logits(len(step.selected))
        return self.program.view(self._logits, step)

    def most_probable(self, step: StepArrays) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """The token of the largest logit of each selected token, and whether all its logits are finite. [S]"""
        if self._gathered is not None:
            return self._gathered.most_probable(len(step.selected))
        tokens, is_finite = (self.program.view(it, step)[:, 0] for it in (self._best.tokens, self._best.are_finite))
        return tokens.copy(), is_finite.astype(np.bool_)
