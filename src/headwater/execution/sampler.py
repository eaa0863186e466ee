"""Choose the next token of each row on a CPU. Greedy rows cost one argmax; only rows that need more pay for more."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.draws import Draws
from headwater.devices.noise import noise_keys
from headwater.execution.penalties import LogitEdits, needs_edits
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import SlotAssignment

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]
Draw = Callable[[Logits, Draws], Tokens]

# Below this, dividing logits by the temperature overflows before it makes a difference to greedy.
_GREEDY_TEMPERATURE = 1e-6
_MAX_TOP_K = 2**31 - 1


class Sampler:
    """Samples rows of logits by their requests' parameters; keeps what penalties need to know per slot.

    `draw` is the device's.
    """

    def __init__(self, *, vocab_size: int, draw: Draw) -> None:
        self._vocab_size = vocab_size
        self._draw = draw
        self._edits: dict[int, LogitEdits] = {}  # by slot

    def assign(self, assignment: SlotAssignment) -> None:
        """A request enters a slot."""
        self._edits.pop(assignment.slot, None)
        if needs_edits(assignment.sampling):
            self._edits[assignment.slot] = LogitEdits(assignment, vocab_size=self._vocab_size)

    def batch(self, params: Sequence[SamplingParams], *, slots: Sequence[int]) -> "SamplingBatch":
        """How some rows sample in every step, until one of their slots is assigned again."""
        edited = [(row, self._edits[slot]) for row, slot in enumerate(slots) if slot in self._edits]
        return SamplingBatch(params, edited=edited, draw=self._draw)

    def sample(
        self,
        logits: Logits,
        params: Sequence[SamplingParams],
        *,
        slots: Sequence[int],
        num_outputs: Sequence[int],
    ) -> Tokens:
        """One token per row. float32 `logits` [rows, vocab_size] may be overwritten."""
        tokens = logits.argmax(axis=-1).astype(np.int32)
        return self.batch(params, slots=slots).sample(logits, np.array(num_outputs, dtype=np.int32), greedy=tokens)


class SamplingBatch:
    """Rows that sample together in each of several steps."""

    def __init__(
        self, params: Sequence[SamplingParams], *, edited: Sequence[tuple[int, LogitEdits]], draw: Draw
    ) -> None:
        self._edited = edited
        self._draw = draw
        random = [row for row, sampling in enumerate(params) if not is_greedy(sampling)]
        self._random = np.array(random, dtype=np.int32)
        self._seeds = np.array([params[row].seed for row in random], dtype=np.uint64)
        self._draws = _draws(self._random, [params[row] for row in random]) if random else None

    def sample(self, logits: Logits, num_outputs: npt.NDArray[np.int32], *, greedy: Tokens) -> Tokens:
        """One token per row. float32 `logits` [rows, vocab_size] may be overwritten.

        `num_outputs` is how many tokens each request has generated before: the position of its noise. `greedy` is the
        argmax of each row; it becomes the result.
        """
        tokens = greedy
        for row, edits in self._edited:
            edits.apply(logits[row], int(num_outputs[row]))
            tokens[row] = logits[row].argmax()
        if self._draws is not None:
            keys = noise_keys(self._seeds, num_outputs[self._random])
            tokens[self._random] = self._draw(logits, replace(self._draws, keys=keys))
        for row, edits in self._edited:
            edits.count(int(tokens[row]))
        return tokens


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_TEMPERATURE or sampling.top_k == 1


def _draws(rows: npt.NDArray[np.int32], params: Sequence[SamplingParams]) -> Draws:
    """All but the keys, which a step adds."""
    return Draws(
        rows=rows,
        keys=np.zeros(len(rows), dtype=np.uint64),
        temperatures=np.array([it.temperature for it in params], dtype=np.float32),
        top_k=np.array([min(max(it.top_k, 0), _MAX_TOP_K) for it in params], dtype=np.int32),
        top_p=np.array([it.top_p for it in params], dtype=np.float32),
        log_min_p=np.array([math.log(it.min_p) if it.min_p > 0 else -math.inf for it in params], dtype=np.float32),
    )
