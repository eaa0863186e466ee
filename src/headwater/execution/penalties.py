"""Edits of the logits before sampling on a CPU: penalties, biases and the masking of stop tokens.

Formulas: repetition as in CTRL (arXiv 1909.05858), frequency and presence as in OpenAI's API reference.
device_penalties.py does the same on a GPU.
"""

import numpy as np
import numpy.typing as npt

from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import SlotAssignment


def needs_edits(sampling: SamplingParams) -> bool:
    """Whether a request's logits are ever edited. Most are not, and cost nothing."""
    return bool(
        sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.logit_bias
        or sampling.min_new_tokens
    )


class LogitEdits:
    """The edits of one request, with the counts they need. Made when it enters a slot."""

    def __init__(self, assignment: SlotAssignment, *, vocab_size: int) -> None:
        sampling = assignment.sampling
        self._sampling = sampling
        token_ids, num_prompt = assignment.token_ids, assignment.num_prompt_tokens
        self._counts: npt.NDArray[np.float32] | None = None
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._counts = np.bincount(token_ids[num_prompt:], minlength=vocab_size).astype(np.float32)
        self._is_seen: npt.NDArray[np.bool_] | None = None
        if sampling.repetition_penalty != 1.0:
            self._is_seen = np.bincount(token_ids, minlength=vocab_size) > 0
        bias = sampling.logit_bias or {}
        self._bias_ids = np.array(list(bias), dtype=np.int64)
        self._biases = np.array(list(bias.values()), dtype=np.float32)
        self._stop_ids = np.array(assignment.stop_token_ids, dtype=np.int64)

    def apply(self, logits: npt.NDArray[np.float32], num_outputs: int) -> None:
        """Edit float32[vocab_size] in place, before the `num_outputs + 1`-th token is chosen."""
        sampling = self._sampling
        if self._is_seen is not None:
            ids = np.flatnonzero(self._is_seen)
            values, penalty = logits[ids], np.float32(sampling.repetition_penalty)
            logits[ids] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts is not None:
            ids = np.flatnonzero(self._counts)
            logits[ids] -= self._counts[ids] * np.float32(sampling.frequency_penalty)
            logits[ids] -= np.float32(sampling.presence_penalty)
        logits[self._bias_ids] += self._biases
        if num_outputs < sampling.min_new_tokens:
            logits[self._stop_ids] = -np.inf

    def count(self, token_id: int) -> None:
        """Count a chosen token."""
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._is_seen is not None:
            self._is_seen[token_id] = True
