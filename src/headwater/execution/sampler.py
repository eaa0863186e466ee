"""Choose the next token of each row on a CPU. Greedy rows cost one argmax; only rows that need more pay for more."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.draw import draw_index
from headwater.devices.noise import NoiseKeys, noise_keys
from headwater.execution.logprobs import candidates, logsumexp
from headwater.execution.penalties import LogitEdits, needs_edits
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import SlotAssignment

Logits = npt.NDArray[np.float32]
Draw = Callable[[Logits, NoiseKeys], npt.NDArray[np.int64]]

# Below this, dividing logits by the temperature overflows before it makes a difference to greedy.
_GREEDY_TEMPERATURE = 1e-6
# Finding the few most probable ids is far cheaper than sorting them all, and nuclei are almost always small.
_CANDIDATES = (256, 4096)


class Sampler:
    """Samples rows of logits by their requests' parameters; keeps what penalties need to know per slot.

    `draw` draws a token for each row from softmax(logits[row]), with the noise of the row's key.
    """

    def __init__(self, *, vocab_size: int, draw: Draw) -> None:
        self._vocab_size = vocab_size
        self._draw_whole = draw
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
            keys = noise_keys([params[row].seed for row in random], [num_outputs[row] for row in random])
            with np.errstate(invalid="ignore", over="ignore"):  # a row that is not finite fails by itself
                tokens[random] = self._draw(logits, random, [params[row] for row in random], keys)
        for row, edits in edited:
            edits.count(int(tokens[row]))
        return tokens

    def _draw(
        self, logits: Logits, rows: Sequence[int], params: Sequence[SamplingParams], keys: NoiseKeys
    ) -> npt.NDArray[np.int64]:
        """Sample the given rows; `params` and `keys` are theirs."""
        for row, sampling in zip(rows, params, strict=True):
            logits[row] /= np.float32(sampling.temperature)
        tokens = np.empty(len(rows), dtype=np.int64)
        whole = [index for index, sampling in enumerate(params) if not has_cut(sampling)]
        if whole:
            part = logits if len(whole) == len(logits) else logits[[rows[index] for index in whole]]
            for row, index in zip(part, whole, strict=True):
                _cut_min_p(row, params[index].min_p)
            tokens[whole] = self._draw_whole(part, keys[whole])
        for index, sampling in enumerate(params):
            if has_cut(sampling):
                tokens[index] = _draw_cut(logits[rows[index]], sampling, keys[index])
        return tokens


def has_cut(sampling: SamplingParams) -> bool:
    """Whether top_k or top_p leaves out ids, which needs the most probable ids in order."""
    return sampling.top_k > 0 or sampling.top_p < 1.0


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_TEMPERATURE or sampling.top_k == 1


def _draw_cut(row: Logits, sampling: SamplingParams, key: np.uint64) -> int:
    """Sample among the ids that top_k, top_p and min_p leave, looking at as few candidates as it can.

    top_k comes first; top_p then keeps the fewest most probable ids whose probabilities, renormalised after top_k,
    sum to it; min_p last.
    """
    if 0 < sampling.top_k < len(row):
        ids = candidates(row, sampling.top_k)
        ordered = _descending(row[ids])[: sampling.top_k]
        cumulative = _cumulative(ordered, logsumexp(ordered))
    else:
        total = logsumexp(row)
        for num in (*_CANDIDATES, len(row)):
            ids = candidates(row, num)
            ordered = _descending(row[ids])
            cumulative = _cumulative(ordered, total)
            if cumulative[-1] >= sampling.top_p:
                break
    num_kept = len(ordered)
    if sampling.top_p < 1.0:
        num_kept = 1 + int((cumulative[:-1] < sampling.top_p).sum())
    if sampling.min_p > 0:
        num_kept = min(num_kept, int((ordered >= _floor(ordered[0], sampling.min_p)).sum()))
    kept = _at_least(row, ids, ordered[max(num_kept, 1) - 1], num=num_kept)
    return int(kept[draw_index(row[kept], key, kept.astype(np.uint32))])


def _descending(values: Logits) -> Logits:
    return -np.sort(-values)


def _cumulative(ordered: Logits, total: np.float32) -> npt.NDArray[np.float64]:
    """Sums of the probabilities of the first ids, one more each time."""
    return np.cumsum(np.exp(ordered - total), dtype=np.float64)


def _at_least(row: Logits, ids: npt.NDArray[np.int64], least: np.float32, *, num: int) -> npt.NDArray[np.int64]:
    """The `num` of the ids whose logits are `least` or more; of those that equal it, the first."""
    kept = ids[row[ids] >= least]
    if len(kept) > num:
        last = kept[row[kept] == least][num - len(kept) :]
        kept = np.setdiff1d(kept, last)
    return kept if len(kept) else ids[:1]  # a row of NaN, which fails anyway


def _cut_min_p(row: Logits, min_p: float) -> None:
    """Drop ids less probable than min_p times the most probable one, in place."""
    if min_p > 0:
        row[row < _floor(row.max(), min_p)] = -np.inf


def _floor(top: np.float32, min_p: float) -> np.float32:
    return top + np.float32(math.log(min_p))
