"""What drafts the next tokens of a request from text that is known already. No second model."""

from dataclasses import dataclass
from typing import Protocol

from headwater.cache.radix_tree import RadixTree
from headwater.messages.base import TokenIds
from headwater.messages.choices import SpeculativeAlgorithmName
from headwater.scheduling.request import Request
from headwater.scheduling.speculation.drafting import Drafting, Source
from headwater.scheduling.speculation.suffixes import TokenSuffixes
from headwater.scheduling.speculation.tree_text import TreeText

_LONG = 8  # tokens that agree


class Drafter(Protocol):
    """Drafts tokens. They need not be right: a step verifies them."""

    def draft(self, request: Request, drafting: Drafting, most: int) -> tuple[TokenIds, Source]:
        """At most `most` tokens that may follow those of `request`, all of which are known, and their source.

        int32[n]. Source.NONE with no tokens.
        """
        ...


class NgramDrafter:
    """Continues the request's text as it went on where its newest tokens occurred before."""

    def draft(self, request: Request, drafting: Drafting, most: int) -> tuple[TokenIds, Source]:
        if drafting.suffixes is None:
            drafting.suffixes = TokenSuffixes(request.tokens)
        tokens, num_equal = drafting.suffixes.next_tokens(most)
        if not len(tokens):
            return tokens, Source.NONE
        return tokens, Source.LONG_SUFFIX if num_equal >= _LONG else Source.SHORT_SUFFIX


class TreeDrafter:
    """Continues it as the prefix tree goes on after the whole text; where it does not, as `NgramDrafter`."""

    def __init__(self, tree: RadixTree) -> None:
        self._text = TreeText(tree)
        self._own = NgramDrafter()

    def draft(self, request: Request, drafting: Drafting, most: int) -> tuple[TokenIds, Source]:
        tokens = self._text.next_tokens(request, drafting, most)
        return (tokens, Source.TREE) if len(tokens) else self._own.draft(request, drafting, most)


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Which steps may have drafts. Others compute at the device's best rate anyway."""

    max_requests: int
    max_rows: int  # those of the requests included


CPU_LIMITS = DraftLimits(max_requests=16, max_rows=32)
# a GPU's step takes as long as reading the weights up to more rows; how long drafts are follows from measured times
GPU_LIMITS = DraftLimits(max_requests=32, max_rows=128)


@dataclass(frozen=True, slots=True)
class SpeculationSettings:
    """Where drafts come from, and how long they are at most."""

    algorithm: SpeculativeAlgorithmName = "none"
    num_draft_tokens: int = 12  # of one request in one step
    drafter: Drafter | None = None  # in place of the algorithm's: a simulation has its own
    limits: DraftLimits = CPU_LIMITS

    def make_drafter(self, tree: RadixTree) -> Drafter | None:
        """None if nothing is drafted."""
        if self.drafter is not None or self.algorithm == "none":
            return self.drafter
        return NgramDrafter() if self.algorithm == "ngram" else TreeDrafter(tree)


NO_SPECULATION = SpeculationSettings()
