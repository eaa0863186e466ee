"""What penalties.py does, on a GPU and without waiting for it."""

import math

import numpy as np
import numpy.typing as npt
import torch

from headwater.scheduling.plan import SlotAssignment


class DeviceLogitEdits:
    """The edits of one request, with the counts they need. Made when it enters a slot."""

    def __init__(self, assignment: SlotAssignment, *, vocab_size: int, device: torch.device) -> None:
        sampling = assignment.sampling
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._device = device
        token_ids, num_prompt = assignment.token_ids, assignment.num_prompt_tokens
        self._counts: torch.Tensor | None = None
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._counts = self._histogram(token_ids[num_prompt:])
        self._is_seen: torch.Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._is_seen = self._histogram(token_ids) > 0
        bias = sampling.logit_bias or {}
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._biases = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._stop_ids = torch.tensor(assignment.stop_token_ids, dtype=torch.int64, device=device)

    def apply(self, logits: torch.Tensor, num_outputs: int) -> None:
        """Edit float32[vocab_size] in place, before the `num_outputs + 1`-th token is chosen."""
        sampling = self._sampling
        if self._is_seen is not None:
            penalty = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._is_seen, penalised, logits))
        if self._counts is not None:
            logits.sub_(self._counts, alpha=sampling.frequency_penalty)
            logits.sub_((self._counts > 0).float(), alpha=sampling.presence_penalty)
        if len(self._bias_ids):
            logits.index_add_(0, self._bias_ids, self._biases)
        if num_outputs < sampling.min_new_tokens:
            logits.index_fill_(0, self._stop_ids, -math.inf)

    def count(self, token_id: torch.Tensor) -> None:
        """Count a chosen token, int64[1] on the device. Does not wait for it."""
        if self._counts is not None:
            self._counts.index_add_(0, token_id, torch.ones_like(token_id, dtype=torch.float32))
        if self._is_seen is not None:
            self._is_seen.index_fill_(0, token_id, True)

    def _histogram(self, token_ids: npt.NDArray[np.int32]) -> torch.Tensor:
        counts = np.bincount(token_ids, minlength=self._vocab_size)
        return torch.from_numpy(counts).to(dtype=torch.float32, device=self._device)
