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
        self._decodes: list[Request] = []
        self._chunks: list[Row] = []
        self._assignments: list[SlotAssignment] = []
        self._page_copies: list[PageCopy] = []

    @property
    def is_empty(self) -> bool:
        return not self._decodes and not self._chunks

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
        self._decodes.append(request)
        self.num_tokens_left -= 1

    def add_chunk(self, request: Request, num_tokens: int, *, samples: bool) -> None:
        self._chunks.append((request, num_tokens, samples))
        self.num_tokens_left -= num_tokens

    def build(self, step_id: int, *, uses: Sequence[int], page_updates: tuple[PageUpdate, ...]) -> StepPlan:
        """The plan of the collected rows. `uses`: of all slots."""
        rows, columns = self.rows, self._columns
        slots = [r.slot for r, _, _ in rows]
        token_ids = columns.newest.array([NEWEST_TOKEN] * len(self._decodes))
        if self._chunks:
            chunks = [r.tokens.view(r.progress.num_computed, r.progress.num_computed + n) for r, n, _ in self._chunks]
            token_ids = np.concatenate([token_ids, *chunks])
        return StepPlan(
            step_id=step_id,
            assignments=tuple(self._assignments),
            page_updates=page_updates,
            slots=columns.slots.array(slots),
            uses=columns.uses.array([uses[slot] for slot in slots]),
            num_computed=np.array([r.progress.num_computed for r, _, _ in rows], dtype=np.int32),
            num_tokens=columns.num_tokens.array([n for _, n, _ in rows]),
            samples=columns.samples.array([s for _, _, s in rows]),
            token_ids=token_ids,
            num_decodes=len(self._decodes),
            num_outputs=np.array([r.progress.num_launched_samples for r, _, _ in rows], dtype=np.int32),
            page_copies=tuple(self._page_copies),
            grammar_rows=columns.grammar_rows.array(
                [row for row, (r, _, samples) in enumerate(rows) if samples and r.needs_mask]
            ),
        )

    @property
    def rows(self) -> list[Row]:
        """In the order of the plan."""
        return [(r, 1, True) for r in self._decodes] + self._chunks
