"""Choose the next token of each row on a CPU. Greedy rows cost one argmax; only rows that need more pay for more."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.draws import Draws, Masks
from headwater.devices.noise import noise_keys
from headwater.execution.penalties import LogitEdits, needs_edits
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import SlotAssignment

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]


class SamplingDevice(Protocol):
    """What sampling needs of the device."""

    def draw(self, logits: Logits, draws: Draws) -> Tokens: ...

    def best_allowed(self, logits: Logits, rows: Tokens, *, masks: Masks, mask_rows: Tokens) -> Tokens:
        """The most probable token of each of some rows that its mask allows."""
        ...


class RowMasks(NamedTuple):
    """The tokens that some rows may choose from; the other rows may choose any."""

    rows: npt.NDArray[np.int32]  # [M]
    words: Masks  # [M, ceil(vocab_size / 32)]


# Below this, dividing logits by the temperature overflows before it makes a difference to greedy.
_GREEDY_TEMPERATURE = 1e-6
_MAX_TOP_K = 2**31 - 1


class Sampler:
    """Samples rows of logits by their requests' parameters; keeps what penalties need to know per slot."""

    def __init__(self, *, vocab_size: int, device: SamplingDevice) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._edits: dict[int, LogitEdits] = {}  # by slot

    def assign(self, assignment: SlotAssignment) -> None:
        """A request enters a slot."""
        self._edits.pop(assignment.slot, None)
        if needs_edits(assignment.sampling):
            self._edits[assignment.slot] = LogitEdits(assignment, vocab_size=self._vocab_size)

    def batch(self, params: Sequence[SamplingParams], *, slots: Sequence[int]) -> "SamplingBatch":
        """How some rows sample in every step, until one of their slots is assigned again."""
        edited = [(row, self._edits[slot]) for row, slot in enumerate(slots) if slot in self._edits]
        return SamplingBatch(params, edited=edited, device=self._device)

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
        self, params: Sequence[SamplingParams], *, edited: Sequence[tuple[int, LogitEdits]], device: SamplingDevice
    ) -> None:
        self._edited = edited
        self._device = device
        self.needs_logits = bool(edited) or not all(is_greedy(it) for it in params)  # else `greedy` is all it needs
        random = [row for row, sampling in enumerate(params) if not is_greedy(sampling)]
        self._random = np.array(random, dtype=np.int32)
        self._is_random = np.zeros(len(params), dtype=np.bool_)
        self._is_random[self._random] = True
        self._seeds = np.array([params[row].seed for row in random], dtype=np.uint64)
        self._draws = _draws(self._random, [params[row] for row in random]) if random else None

    def sample(
        self, logits: Logits, num_outputs: npt.NDArray[np.int32], *, greedy: Tokens, masks: RowMasks | None = None
    ) -> Tokens:
        """One token per row. float32 `logits` [rows, vocab_size] may be overwritten.

        `num_outputs` is how many tokens each request has generated before: the position of its noise. `greedy` is the
        argmax of each row; it becomes the result. A mask applies after penalties and biases.
        """
        tokens = greedy
        for row, edits in self._edited:
            edits.apply(logits[row], int(num_outputs[row]))
            tokens[row] = logits[row].argmax()
        if masks is not None:
            self._choose_best_allowed(logits, masks, tokens)
        if self._draws is not None:
            keys = noise_keys(self._seeds, num_outputs[self._random])
            draws = replace(self._draws, keys=keys)
            if masks is not None:
                draws = replace(draws, masks=masks.words, mask_rows=self._mask_rows(masks)[self._random])
            tokens[self._random] = self._device.draw(logits, draws)
        for row, edits in self._edited:
            edits.count(int(tokens[row]))
        return tokens

    def _choose_best_allowed(self, logits: Logits, masks: RowMasks, tokens: Tokens) -> None:
        """Write the tokens of the greedy rows that have masks. Rows whose token is allowed have theirs already."""
        newest = tokens[masks.rows]
        words = masks.words[np.arange(len(newest)), newest >> 5]
        is_allowed = (words >> (newest & 31).astype(np.uint32)) & 1 != 0
        of = np.flatnonzero(~(is_allowed | self._is_random[masks.rows])).astype(np.int32)
        if len(of):
            rows = np.ascontiguousarray(masks.rows[of])
            tokens[rows] = self._device.best_allowed(logits, rows, masks=masks.words, mask_rows=of)

    def _mask_rows(self, masks: RowMasks) -> npt.NDArray[np.int32]:
        """The mask of each row: its index, -1 for none. [rows]"""
        found = np.full(len(self._is_random), -1, dtype=np.int32)
        found[masks.rows] = np.arange(len(masks.rows), dtype=np.int32)
        return found


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
