"""Builds the plan of a step from its rows."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headwater.cache.lease import Lease
from headwater.messages.generation import LogprobParams
from headwater.scheduling.plan import NEWEST_TOKEN, PageCopy, PageUpdate, SlotAssignment, StepPlan
from headwater.scheduling.request import Request

Row = tuple[Request, int, bool]  # request, tokens, whether it samples


class Column:
    """A column of the plans, made anew only when its numbers change: most steps have the rows of the step before."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = dtype
        self._numbers: list[int] = []
        self._array = np.array([], dtype=dtype)

    def array(self, numbers: list[int]) -> npt.NDArray:
        """Plans share it, so its elements are never changed."""
        if numbers != self._numbers:
            self._numbers, self._array = numbers, np.array(numbers, dtype=self._dtype)
        return self._array


class PlanColumns:
    """The columns that plans share."""

    def __init__(self) -> None:
        self.slots = Column(np.int32)
        self.uses = Column(np.int64)
        self.num_tokens = Column(np.int32)
        self.samples = Column(np.bool_)
        self.newest = Column(np.int32)  # token ids of decodes
        self.grammar_rows = Column(np.int32)


class PlanBuilder:
    """Collects the rows of a step, decodes before prefill chunks, and the requests that enter slots with it."""

    def __init__(self, *, max_tokens: int, columns: PlanColumns | None = None) -> None:
        """`columns`: those of the plans before."""
        self.num_tokens_left = max_tokens
        self._columns = columns or PlanColumns()
        self.decodes: list[Request] = []
        self._drafts: dict[int, list[int]] = {}  # by slot
        self._chunks: list[Row] = []
        self._assignments: list[SlotAssignment] = []
        self._page_copies: list[PageCopy] = []

    @property
    def is_empty(self) -> bool:
        return not self.decodes and not self._chunks

    def assign(self, request: Request, *, use: int) -> None:
        """`request` has entered its slot, for the `use`-th time that the slot is used."""
        logprobs = request.logprobs
        if logprobs is not None and request.num_outputs:  # its prompt was reported with its first token
            logprobs = LogprobParams(top=logprobs.top, token_ids=logprobs.token_ids)
        self._assignments.append(
            SlotAssignment(
                slot=request.slot,
                use=use,
                sampling=request.sampling,
                token_ids=request.tokens.view().copy(),
                num_prompt_tokens=request.num_prompt_tokens,
                stop_token_ids=tuple(request.stop_token_ids),
                logprobs=logprobs,
                pooling=request.pooling,
                adapter=0 if request.adapter is None else request.adapter.slot,
            )
        )

    def copy_part(self, lease: Lease) -> None:
        """Fill the first private page of `lease` with the part of a page that the lease has found."""
        part = lease.part
        if part is not None:
            target = int(lease.private[0])
            self._page_copies.append(PageCopy(source=part.page, target=target, num_tokens=part.num_tokens))

    def add_decode(self, request: Request) -> None:
        self.decodes.append(request)
        self.num_tokens_left -= 1

    def add_draft(self, request: Request, token_ids: list[int]) -> None:
        """Verify in this step that `token_ids` follow the next token of `request`, one of its decodes."""
        self._drafts[request.slot] = token_ids
        self.num_tokens_left -= len(token_ids)

    def add_chunk(self, request: Request, num_tokens: int, *, samples: bool) -> None:
        self._chunks.append((request, num_tokens, samples))
        self.num_tokens_left -= num_tokens

    def build(self, step_id: int, *, uses: Sequence[int], page_updates: tuple[PageUpdate, ...]) -> StepPlan:
        """The plan of the collected rows. `uses`: of all slots."""
        rows, columns = self.rows, self._columns
        slots = [r.slot for r, _, _ in rows]
        num_computed = np.array([r.progress.num_computed for r, _, _ in rows], dtype=np.int32)
        num_outputs = np.array([r.progress.num_launched_samples for r, _, _ in rows], dtype=np.int32)
        if self._drafts:
            ahead = self._num_ahead(len(rows))
            num_computed += ahead
            num_outputs += ahead
        token_ids = columns.newest.array(self._decode_ids())
        num_decodes = len(token_ids)
        if self._chunks:
            chunks = [r.tokens.view(r.progress.num_computed, r.progress.num_computed + n) for r, n, _ in self._chunks]
            token_ids = np.concatenate([token_ids, *chunks])
        return StepPlan(
            step_id=step_id,
            assignments=tuple(self._assignments),
            page_updates=page_updates,
            slots=columns.slots.array(slots),
            uses=columns.uses.array([uses[slot] for slot in slots]),
            num_computed=num_computed,
            num_tokens=columns.num_tokens.array([n for _, n, _ in rows]),
            samples=columns.samples.array([s for _, _, s in rows]),
            token_ids=token_ids,
            num_decodes=num_decodes,
            num_outputs=num_outputs,
            page_copies=tuple(self._page_copies),
            grammar_rows=columns.grammar_rows.array(
                [row for row, (r, _, samples) in enumerate(rows) if samples and r.needs_mask]
            ),
        )

    @property
    def rows(self) -> list[Row]:
        """In the order of the plan: each decode is followed by its draft."""
        if not self._drafts:
            return [(r, 1, True) for r in self.decodes] + self._chunks
        decodes = [(r, 1, True) for r in self.decodes for _ in range(1 + len(self._drafts.get(r.slot, ())))]
        return decodes + self._chunks

    def _decode_ids(self) -> list[int]:
        """What the decodes and their drafts compute. A slot that has had a draft does not know its newest token."""
        ids = [NEWEST_TOKEN if r.drafting is None else _newest_known(r) for r in self.decodes]
        if not self._drafts:
            return ids
        named = zip(self.decodes, ids, strict=True)
        return [it for r, newest in named for it in (newest, *self._drafts.get(r.slot, ()))]

    def _num_ahead(self, num_rows: int) -> npt.NDArray[np.int32]:
        """How many rows of its draft precede each row. int32[num_rows]"""
        counts = [it for r in self.decodes for it in range(1 + len(self._drafts.get(r.slot, ())))]
        return np.array(counts + [0] * (num_rows - len(counts)), dtype=np.int32)


def _newest_known(request: Request) -> int:
    """The newest token of a decode, if it is known already."""
    is_known = request.progress.num_launched_samples == request.num_outputs
    return request.tokens.newest if is_known else NEWEST_TOKEN
