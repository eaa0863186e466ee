"""The masks of a step: which tokens the grammars of its rows allow next."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from headwater.grammars.matcher import GrammarCompiler, Matcher
from headwater.scheduling.plan import StepPlan, TokenMasks
from headwater.scheduling.request import Request
from headwater.scheduling.running import Slots

_ALL = np.uint32(0xFFFFFFFF)


class MaskBuffer:
    """Fills the masks of one launched step after the other, in the same memory."""

    def __init__(self, compiler: GrammarCompiler | None, slots: Slots) -> None:
        self._given = compiler
        self._slots = slots
        self._words = np.zeros((0, 0), dtype=np.uint32)

    def fill(self, plan: StepPlan) -> TokenMasks:
        """The masks of the plan's grammar rows. All earlier steps have been collected. Valid until the next call."""
        num_rows = len(plan.grammar_rows)
        if num_rows > len(self._words):
            self._words = np.zeros((num_rows, self._compiler.num_words), dtype=np.uint32)
        requests = [self._request(plan, row) for row in plan.grammar_rows.tolist()]
        words = self._words[:num_rows]
        states = [None if request is None else request.grammar for request in requests]
        matchers = [None if state is None else state.matcher for state in states]
        may_end = self._fill(matchers, words)
        for row, (request, state) in enumerate(zip(requests, states, strict=True)):
            if request is None or state is None or state.is_over:
                words[row] = _ALL  # of a request that has ended, or ends when the step is collected
            elif (forced := state.forced_token) is not None:
                words[row] = 0
                _change(words[row], (forced,), is_allowed=True)
            elif state.is_in_free_text:
                _change(words[row], request.stop_token_ids, is_allowed=False)
            else:
                opening = state.opening_token
                more = request.stop_token_ids if may_end[row] else frozenset[int]()
                _change(words[row], more if opening is None else {*more, opening}, is_allowed=True)
        return TokenMasks(rows=plan.grammar_rows, words=words)

    @property
    def _compiler(self) -> GrammarCompiler:
        assert self._given is not None, "without a compiler, no row has a grammar"
        return self._given

    def _request(self, plan: StepPlan, row: int) -> Request | None:
        """The request of a row; None if it has left its slot."""
        return self._slots.at(int(plan.slots[row]), use=int(plan.uses[row]))

    def _fill(self, matchers: Sequence[Matcher | None], words: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """As `fill` of the compiler; all tokens are allowed in rows without a matcher."""
        present = [matcher for matcher in matchers if matcher is not None]
        if len(present) == len(matchers):
            return self._compiler.fill(present, words)
        rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
        words[:] = _ALL
        may_end = np.zeros(len(words), dtype=np.bool_)
        if rows:
            some = np.zeros((len(rows), words.shape[1]), dtype=np.uint32)
            may_end[rows] = self._compiler.fill(present, some)
            words[rows] = some
        return may_end


def _change(words: npt.NDArray[np.uint32], token_ids: Iterable[int], *, is_allowed: bool) -> None:
    """Allow or forbid some tokens in one mask."""
    for token_id in token_ids:
        bit = np.uint32(1 << token_id % 32)
        words[token_id // 32] = words[token_id // 32] | bit if is_allowed else words[token_id // 32] & ~bit
