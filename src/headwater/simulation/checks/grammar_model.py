"""The grammar of one request, as an ideal engine follows it: a function of the tokens so far."""

from collections.abc import Sequence

from headwater.messages.generation import Generate
from headwater.simulation.fakes.grammar import BROKEN, FakeGrammar, choose_freely, choose_from


class GrammarModel:
    """Knows every allowed token of an answer from its tokens alone. It shares no state with the engine."""

    def __init__(
        self, message: Generate, *, stop_ids: frozenset[int], end_ids: frozenset[int], vocab_size: int
    ) -> None:
        assert message.grammar is not None
        self.text = message.grammar.text
        self._begins_after = list(message.grammar.begins_after)
        self._begins_within = message.grammar.begins_within
        self._opens_with = message.grammar.opens_with
        self._grammar = None if self.text in ("", BROKEN) else FakeGrammar.parse(self.text)
        self._sampling = message.sampling
        self._stop_ids = stop_ids
        self._end_ids = end_ids
        self._vocab_size = vocab_size

    def next_token(self, total: int, outputs: Sequence[int]) -> int:
        """The token that follows `outputs` with this sum of all KV."""
        favourites = list(self._sampling.logit_bias or ())
        allowed = self._allowed(outputs)
        if len(allowed) == self._vocab_size:
            return choose_freely(total, self._vocab_size)
        if len(outputs) < self._sampling.min_new_tokens:
            allowed = [token for token in allowed if token not in self._stop_ids] or allowed
        return choose_from(total, allowed or range(self._vocab_size), favourites=favourites)

    def is_complete(self, outputs: Sequence[int]) -> bool:
        accepted = self._accepted(outputs)
        return accepted is not None and bool(self.text) and not self._following(accepted)

    def fails_after(self, outputs: Sequence[int]) -> bool:
        """Whether the matcher fails at the mask that follows `outputs`."""
        accepted = self._accepted(outputs)
        return accepted is not None and self._grammar is not None and len(accepted) == self._grammar.fails_at

    def _allowed(self, outputs: Sequence[int]) -> list[int]:
        everything = list(range(self._vocab_size))
        accepted = self._accepted(outputs)
        if self.fails_after(outputs):
            return everything
        if accepted is None and self._begins_within is not None:
            num_free = max(self._begins_within, 1) if self._opens_with is not None else self._begins_within
            if len(outputs) >= num_free:
                return [self._begins_after[len(outputs) - num_free]]
        if not self.text:
            return everything
        if accepted is None:
            return [token for token in everything if token not in self._stop_ids]
        assert self._grammar is not None, "a broken grammar never runs"
        ends = self._stop_ids if self._grammar.may_end_after(accepted) else frozenset()
        opening = {self._opens_with} if self._opens_with is not None and not outputs else set()
        return sorted({*self._following(accepted), *ends, *opening})

    def _following(self, accepted: Sequence[int]) -> list[int]:
        assert self._grammar is not None, "a broken grammar never runs"
        return self._grammar.allowed_after(accepted, vocab_size=self._vocab_size, end_ids=self._end_ids)

    def _accepted(self, outputs: Sequence[int]) -> Sequence[int] | None:
        """The part of `outputs` that is in the grammar; None before it begins."""
        size = len(self._begins_after)
        if not size or (self._opens_with is not None and list(outputs[:1]) != [self._opens_with]):
            return outputs
        for end in range(size, len(outputs) + 1):
            if list(outputs[end - size : end]) == self._begins_after:
                return outputs[end:]
        return None
