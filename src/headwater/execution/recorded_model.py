"""A model as a CPU runs it: recorded once, then one call per step."""

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.program import StepArrays
from headwater.devices.cpu.row_ops import argmax, select_rows
from headwater.devices.kv_memory import KVLayout
from headwater.models.decoder import DecoderModel


class RecordedModel:
    """The program of one model over KV pages of one layout.

    Its first ops compute the hidden states of all tokens, the others the logits of the selected ones.
    """

    def __init__(self, model: DecoderModel, device: CpuDevice, *, layout: KVLayout) -> None:
        self._program = program = device.start_program()
        attention = device.record_attention(program, model.geometry, layout, rotary=model.rotary)
        hidden = program.keep(model.forward(program.token_ids, attention))
        self._num_forward_ops = len(program.ops)
        self._logits = program.keep(model.logits(select_rows(hidden)))
        self._tokens, self._is_finite = (program.keep(it) for it in argmax(self._logits))

    def run(self, step: StepArrays) -> None:
        """Compute all of a step: keys and values to their pages, and what `logits` and `most_probable` return."""
        self._program.run(step, end=None if len(step.selected) else self._num_forward_ops)

    def run_logits(self, step: StepArrays) -> None:
        """Compute the logits of other selected tokens of the step that was run last."""
        self._program.run(step, first=self._num_forward_ops)

    def logits(self, step: StepArrays) -> npt.NDArray[np.float32]:
        """float32[S, vocab_size], a view that the next run overwrites."""
        return self._program.view(self._logits, step)

    def most_probable(self, step: StepArrays) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """The token of the largest logit of each selected token, and whether all its logits are finite. [S]"""
        tokens, is_finite = (self._program.view(it, step)[:, 0] for it in (self._tokens, self._is_finite))
        return tokens.copy(), is_finite.astype(np.bool_)
