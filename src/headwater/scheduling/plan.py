"""What the scheduler hands to the runner, and what comes back: plain frozen data, numpy and msgspec only.

A plan says what *changes*: a runner keeps the state of its slots (page table, sampling parameters, token
counts, newest token) between steps, so a decode step carries a few integers per slot.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from headwater.messages.base import TokenIds
from headwater.messages.generation import LogprobParams, Pooling, SamplingParams, TokenLogprob

_NO_ROWS = np.zeros(0, dtype=np.int32)
NEWEST_TOKEN = -1  # in StepPlan.token_ids: the token this slot sampled last, perhaps known to the runner alone


class SlotAssignment(Struct, frozen=True, eq=False):
    """A request enters a slot; everything the slot held before is void."""

    slot: int
    use: int  # use count of the slot: results of an earlier use are dropped
    sampling: SamplingParams
    token_ids: TokenIds  # int32[n]: prompt and, after a retraction, what was generated before
    num_prompt_tokens: int  # token_ids[num_prompt_tokens:] are generated tokens (penalties count them)
    stop_token_ids: tuple[int, ...]  # EOS included; masked while fewer than min_new_tokens were generated
    logprobs: LogprobParams | None = None
    pooling: Pooling | None = None
    adapter: int = 0  # slot of the runner's memory for adapters; 0: none


class PageUpdate(Struct, frozen=True, eq=False):
    """Entries [first, first + len(pages)) of a slot's page table are now `pages`."""

    slot: int
    first: int
    pages: npt.NDArray[np.int32]


class PageCopy(Struct, frozen=True):
    """Before a step computes: page `target`, of a slot that enters with it, gets what `source` holds.

    The step reads the first `num_tokens` tokens of it and overwrites the others.
    """

    source: int
    target: int
    num_tokens: int


class StepPlan(Struct, frozen=True, eq=False):
    """One forward pass. Rows [0, num_decodes) compute one token each and sample; the rest are prefill chunks.

    Row r computes positions num_computed[r] .. num_computed[r] + num_tokens[r] - 1 of its sequence. It attends to all
    earlier positions through the slot's page table, and samples the next token if samples[r]. If there are
    `grammar_rows`, no row samples before `StepHandle.choose`, which brings their masks.

    Decodes of one slot that follow each other are a draft: the first computes the slot's newest token, each further row
    the token that the row before it is expected to sample, one position on. All have the slot's page table. A runner
    computes and samples them like other decodes, and does not judge them: the newest token of such a slot is named by
    the next plan. (A runner that drafts by itself would report, beside the tokens, what its rows were computed from.)
    """

    step_id: int
    assignments: tuple[SlotAssignment, ...]
    page_updates: tuple[PageUpdate, ...]
    slots: npt.NDArray[np.int32]  # [R]
    uses: npt.NDArray[np.int64]  # [R]
    num_computed: npt.NDArray[np.int32]  # [R]
    num_tokens: npt.NDArray[np.int32]  # [R]
    samples: npt.NDArray[np.bool_]  # [R]
    token_ids: TokenIds  # [sum(num_tokens)], rows one after another; perhaps NEWEST_TOKEN in decodes
    num_decodes: int
    num_outputs: npt.NDArray[np.int32]  # [R] tokens generated before this step's (the position of the noise)
    page_copies: tuple[PageCopy, ...] = ()
    grammar_rows: npt.NDArray[np.int32] = field(default_factory=lambda: _NO_ROWS)  # that sample under a mask

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def has_drafts(self) -> bool:
        """Whether a decode is followed by others of its slot."""
        slots = self.slots[: self.num_decodes]
        return bool((slots[1:] == slots[:-1]).any())

    @property
    def num_requests(self) -> int:
        """Rows, but for drafts."""
        slots = self.slots[: self.num_decodes]
        return self.num_rows - int((slots[1:] == slots[:-1]).sum())

    @property
    def is_drafted(self) -> npt.NDArray[np.bool_]:
        """Of each decode, whether it is part of a draft, the first row of one included. [num_decodes]"""
        found = np.zeros(self.num_decodes, dtype=np.bool_)
        slots = self.slots[: self.num_decodes]
        is_same = slots[1:] == slots[:-1]
        found[1:] |= is_same
        found[:-1] |= is_same
        return found


class StepResult(Struct, frozen=True, eq=False):
    """What a step produced, row by row as in its plan."""

    step_id: int
    slots: npt.NDArray[np.int32]  # [R]
    uses: npt.NDArray[np.int64]  # [R]
    tokens: npt.NDArray[np.int32]  # [R]; -1 where the plan did not sample
    is_finite: npt.NDArray[np.bool_]  # [R]; False: the logits held NaN, the request must fail
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # row -> of the sampled token
    # row -> of the prompt tokens this chunk *predicted*: positions num_computed+1 .. num_computed+num_tokens,
    # clipped to the prompt, and only from LogprobParams.prompt_start on
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    # row -> sum of the hidden states, after the last norm, that this chunk adds to the embedding of its prompt
    pooled: dict[int, npt.NDArray[np.floating]] = field(default_factory=dict)


class TokenMasks(Struct, frozen=True, eq=False):
    """The tokens that grammars allow in some rows of a step. Valid until the next step's masks are made.

    Bit t % 32 of word t // 32 stands for token t; bits of ids behind the vocabulary mean nothing.
    """

    rows: npt.NDArray[np.int32]  # [M] rows of the plan, ascending: its `grammar_rows`
    words: npt.NDArray[np.uint32]  # [M, ceil(vocab_size / 32)]


class StepHandle(Protocol):
    """A launched step."""

    def choose(self, masks: TokenMasks) -> None:
        """Sample, with these masks. Called once if the plan has grammar rows, when all earlier steps are collected.

        Plans without grammar rows sample without this call.
        """
        ...

    def is_done(self) -> bool:
        """Whether `collect` would return without waiting. False before a `choose` that is due."""
        ...

    def collect(self) -> StepResult:
        """Wait for the step and return its result. Called exactly once."""
        ...
