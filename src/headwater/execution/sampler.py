"""Choose the next token of each row on a CPU. Greedy rows cost one argmax; only rows that need more pay for more."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.draws import Draws
from headwater.devices.noise import noise_keys
from headwater.execution.penalties import LogitEdits, needs_edits
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import SlotAssignment

Logits = npt.NDArray[np.float32]
Draw = Callable[[Logits, Draws], npt.NDArray[np.int32]]

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

    def sample(
        self,
        logits: Logits,
        params: Sequence[SamplingParams],
        *,
        slots: Sequence[int],
        num_outputs: Sequence[int],
        most_probable: npt.NDArray[np.int32] | None = None,
    ) -> npt.NDArray[np.int64]:
        """One token per row. float32 `logits` [rows, vocab_size] may be overwritten.

        `num_outputs` is how many tokens each request has generated before: the position of its noise.
        `most_probable` is the argmax of each row, if it is known.
        """
        edited = [(row, self._edits[slot]) for row, slot in enumerate(slots) if slot in self._edits]
        tokens = logits.argmax(axis=-1) if most_probable is None else most_probable.astype(np.int64)
        for row, edits in edited:
            edits.apply(logits[row], num_outputs[row])
            tokens[row] = logits[row].argmax()
        random = [row for row, sampling in enumerate(params) if not is_greedy(sampling)]
        if random:
            draws = _draws(random, [params[row] for row in random], [num_outputs[row] for row in random])
            tokens[random] = self._draw(logits, draws)
        for row, edits in edited:
            edits.count(int(tokens[row]))
        return tokens


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_TEMPERATURE or sampling.top_k == 1


def _draws(rows: Sequence[int], params: Sequence[SamplingParams], num_outputs: Sequence[int]) -> Draws:
    return Draws(
        rows=np.array(rows, dtype=np.int32),
        keys=noise_keys([it.seed for it in params], num_outputs),
        temperatures=np.array([it.temperature for it in params], dtype=np.float32),
        top_k=np.array([min(max(it.top_k, 0), _MAX_TOP_K) for it in params], dtype=np.int32),
        top_p=np.array([it.top_p for it in params], dtype=np.float32),
        log_min_p=np.array([math.log(it.min_p) if it.min_p > 0 else -math.inf for it in params], dtype=np.float32),
    )
