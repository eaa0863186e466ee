"""Sampling on a GPU without waiting for it: parameters per slot on the host, one kernel for all rows that draw.

Greedy rows with masks have a kernel of their own.
"""

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cuda.kernels.greedy import GreedyScratch, choose_allowed
from headwater.devices.cuda.kernels.sampling import draw_part, draw_tokens
from headwater.devices.noise import noise_keys
from headwater.execution.device_penalties import DeviceLogitEdits
from headwater.execution.penalties import needs_edits
from headwater.execution.sampler import is_greedy
from headwater.execution.staging import ALIGNMENT, Ints, StagingRing
from headwater.scheduling.plan import SlotAssignment


class DeviceSampler:
    """Chooses the tokens of rows that are not plainly greedy. The greedy kernel has chosen the others.

    `scratch` is that kernel's.
    """

    def __init__(
        self, device: torch.device, *, max_running: int, max_rows: int, vocab_size: int, scratch: GreedyScratch
    ) -> None:
        """`max_running` slots, `max_rows` rows in a step."""
        self._device = device
        self._scratch = scratch
        self._vocab_size = vocab_size
        self._edits: dict[int, DeviceLogitEdits] = {}  # by slot
        self.is_special = np.zeros(max_running, dtype=np.bool_)  # by slot: not plainly greedy
        self.draws_from_all = np.zeros(max_running, dtype=np.bool_)  # by slot: draws, and by its temperature alone
        self.has_logprobs = np.zeros(max_running, dtype=np.bool_)  # by slot
        self._params = np.zeros((4, max_running), dtype=np.float32)  # temperature, top_p, log(min_p), top_k
        self._seeds = np.zeros(max_running, dtype=np.uint64)
        self._ring = StagingRing(device, num_ints=(9 + 2) * (max_rows + 16))
        self._mask_ring = StagingRing(device, num_ints=ALIGNMENT)  # grows with the first grammars

    def assign(self, assignment: SlotAssignment) -> None:
        """A request enters a slot."""
        slot, sampling = assignment.slot, assignment.sampling
        self._edits.pop(slot, None)
        if needs_edits(sampling):
            self._edits[slot] = DeviceLogitEdits(assignment, vocab_size=self._vocab_size, device=self._device)
        self.has_logprobs[slot] = assignment.logprobs is not None
        greedy = is_greedy(sampling)
        self.is_special[slot] = not greedy or slot in self._edits
        is_cut = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        self.draws_from_all[slot] = not greedy and not is_cut and slot not in self._edits
        log_min_p = np.log(sampling.min_p) if sampling.min_p > 0 else -np.inf
        temperature = 0.0 if greedy else sampling.temperature
        self._params[:, slot] = (temperature, sampling.top_p, log_min_p, max(sampling.top_k, 0))
        self._seeds[slot] = sampling.seed

    def choose(
        self,
        logits: torch.Tensor,
        rows: Ints,
        *,
        slots: Ints,
        num_outputs: Ints,
        newest: torch.Tensor,
        result: torch.Tensor,
        masks: npt.NDArray[np.uint32] | None = None,
        mask_indices: Ints | None = None,
    ) -> None:
        """Choose for the given `rows` of float32 `logits`, which may be edited, into result[0] and `newest`.

        `slots`, `num_outputs` and `mask_indices` are of these rows. The last are indices in `masks`, the tokens that
        grammars allow, or -1. Enqueues work and returns.
        """
        edited = [(int(row), int(num), self._edits[slot])
                  for row, num, slot in zip(rows, num_outputs, slots.tolist(), strict=True)
                  if slot in self._edits]  # fmt: skip
        for row, num, edits in edited:
            edits.apply(logits[row], num)
        if masks is None or mask_indices is None:
            on_device = self._ring.stage((rows, slots, self._packed(slots, num_outputs)))
            draw_tokens(logits, *on_device, newest=newest, result=result)
        else:
            packed = self._packed(slots, num_outputs)
            self._choose_masked(
                logits, rows, slots, packed, newest=newest, result=result, masks=masks, indices=mask_indices
            )
        for row, _, edits in edited:
            edits.count(result[0, row : row + 1].long())

    def draw_part(
        self, logits: torch.Tensor, rows: Ints, *, slots: Ints, num_outputs: Ints, tokens: range
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best of the part `tokens` of the vocabulary for `rows`, all of which `draws_from_all` holds for.

        The rows and slots on the device, and what `kernels.sampling.draw_part` returns.
        """
        at, to, params = self._ring.stage((rows, slots, self._packed(slots, num_outputs)))
        return at, to, draw_part(logits, at, params, first_token=tokens.start, max_token=tokens.stop - 1)

    def _choose_masked(
        self,
        logits: torch.Tensor,
        rows: Ints,
        slots: Ints,
        packed: Ints,
        *,
        newest: torch.Tensor,
        result: torch.Tensor,
        masks: npt.NDArray[np.uint32],
        indices: Ints,
    ) -> None:
        """As `choose`, with greedy rows that have a mask apart."""
        is_greedy_masked = (self._params[0, slots] <= 0) & (indices >= 0)
        greedy, drawn = np.flatnonzero(is_greedy_masked), np.flatnonzero(~is_greedy_masked)
        drawn_masked = drawn[indices[drawn] >= 0]
        packed[6, drawn_masked] = np.arange(len(drawn_masked), dtype=np.int32)
        words = masks.view(np.int32)
        # indexing copies, which a step of one kind is spared
        greedy_words, drawn_words = self._mask_ring.stage(
            [words if len(part) == len(words) else words[indices[part]] for part in (greedy, drawn_masked)]
        )
        if len(greedy):
            at, to = self._ring.stage((rows[greedy], slots[greedy]))
            choose_allowed(logits, at, to, greedy_words, newest=newest, result=result, scratch=self._scratch)
        if len(drawn):
            on_device = self._ring.stage((rows[drawn], slots[drawn], packed[:, drawn]))
            draw_tokens(logits, *on_device, newest=newest, result=result, masks=drawn_words)

    def _packed(self, slots: Ints, num_outputs: Ints) -> Ints:
        """The parameters of `draw_tokens`, without masks. int32[7, N]"""
        keys = noise_keys(self._seeds[slots], num_outputs)
        params: npt.NDArray[np.float32] = self._params[:, slots]
        packed = np.full((7, len(slots)), -1, dtype=np.int32)
        packed[:3] = params[:3].view(np.int32)
        packed[3] = params[3]
        packed[4:6] = keys.view(np.int32).reshape(-1, 2).T
        return packed
