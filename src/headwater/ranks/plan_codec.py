"""How plans and page copies lie in the records of a plan stream. Rank 0 alone samples, so masks do not travel."""

from array import array
from collections.abc import Sequence
from enum import IntEnum

import msgspec
import numpy as np
import numpy.typing as npt

from headwater.cache.page_pool import PageIds
from headwater.messages.base import pack_ids, unpack_ids
from headwater.messages.generation import LogprobParams, Pooling, SamplingParams
from headwater.ranks.plan_stream import PlanStream, Record
from headwater.scheduling.plan import PageCopy, PageUpdate, SlotAssignment, StepPlan


class Kind(IntEnum):
    """What a record says."""

    ASSIGN = 0  # an assignment of the step that follows
    STEP = 1
    OFFLOAD = 2
    RESTORE = 3
    ORDER = 4  # rare: one of `orders.Order`, in msgpack
    READ_EARLY = 5  # the steps that follow may read a restore that has not ended


class _Assignment(msgspec.Struct, frozen=True, array_like=True):
    """A SlotAssignment whose tokens are bytes."""

    slot: int
    use: int
    sampling: SamplingParams
    token_ids: bytes
    num_prompt_tokens: int
    stop_token_ids: tuple[int, ...]
    logprobs: LogprobParams | None
    pooling: Pooling | None
    adapter: int


_ASSIGN, _STEP = int(Kind.ASSIGN), int(Kind.STEP)  # which pack faster than members of an enum
_encoder = msgspec.msgpack.Encoder()
_assignments = msgspec.msgpack.Decoder(_Assignment)


def write_plan(stream: PlanStream, plan: StepPlan) -> None:
    """Publish a step. Its assignments, which are rare, are records of their own before it.

    The engine's thread waits for this in every step: few calls, since each of them is slow when the caches are cold.
    """
    for assignment in plan.assignments:
        stream.write(_ASSIGN, _pack_assignment(assignment))
    small, pages, num_pages = array("i"), [], 0
    for it in plan.page_updates:
        num = len(it.pages)
        small.extend((it.slot, it.first, num))
        pages.append(it.pages)
        num_pages += num
    for copy in plan.page_copies:
        small.extend((copy.source, copy.target, copy.num_tokens))
    token_ids, grammar_rows, samples = plan.token_ids, plan.grammar_rows, plan.samples
    num_rows, num_tokens, num_masks = len(samples), len(token_ids), len(grammar_rows)
    stream.write_parts(
        _STEP,
        (
            plan.uses, plan.slots, plan.num_computed, plan.num_tokens, plan.num_outputs, token_ids, grammar_rows, small,
            *pages, samples,
        ),
        num_bytes=25 * num_rows + 4 * (num_tokens + num_masks + len(small) + num_pages),
        words=(
            plan.step_id, num_rows, plan.num_decodes, num_tokens, num_masks, len(pages), len(plan.page_copies),
            len(plan.assignments), num_pages,
        ),
    )  # fmt: skip


def read_plan(record: Record, assignments: Sequence[SlotAssignment]) -> StepPlan:
    """The inverse of `write_plan`, with the assignments that were read before."""
    (
        step_id, num_rows, num_decodes, num_tokens, num_grammar_rows, num_updates, num_copies, num_assigned, num_pages,
    ) = record.words[:9]  # fmt: skip
    assert len(assignments) == num_assigned, f"step {step_id} assigns {num_assigned} slots, {len(assignments)} came"
    body, at = record.body, 8 * num_rows
    sizes = (*[num_rows] * 4, num_tokens, num_grammar_rows, 3 * num_updates, 3 * num_copies, num_pages)
    parts = []
    for size in sizes:
        parts.append(body[at : at + 4 * size].view(np.int32))
        at += 4 * size
    slots, num_computed, counts, num_outputs, token_ids, grammar_rows, tables, copies, pages = parts
    updates, first_page = [], 0
    for slot, first, num in tables.reshape(-1, 3).tolist():
        updates.append(PageUpdate(slot=slot, first=first, pages=pages[first_page : first_page + num]))
        first_page += num
    return StepPlan(
        step_id=step_id,
        assignments=tuple(assignments),
        page_updates=tuple(updates),
        slots=slots,
        uses=body[: 8 * num_rows].view(np.int64),
        num_computed=num_computed,
        num_tokens=counts,
        samples=body[at : at + num_rows].view(np.bool_),
        token_ids=token_ids,
        num_decodes=num_decodes,
        num_outputs=num_outputs,
        page_copies=tuple(PageCopy(*each) for each in copies.reshape(-1, 3).tolist()),
        grammar_rows=grammar_rows,
    )


def read_assignment(record: Record) -> SlotAssignment:
    found = _assignments.decode(record.body.data)
    return SlotAssignment(
        slot=found.slot,
        use=found.use,
        sampling=found.sampling,
        token_ids=unpack_ids(found.token_ids),
        num_prompt_tokens=found.num_prompt_tokens,
        stop_token_ids=found.stop_token_ids,
        logprobs=found.logprobs,
        pooling=found.pooling,
        adapter=found.adapter,
    )


def write_copy(stream: PlanStream, kind: Kind, copy_id: int, sources: PageIds, targets: PageIds) -> None:
    num_pages = len(sources)
    assert len(targets) == num_pages
    stream.write_parts(kind, (sources, targets), num_bytes=8 * num_pages, words=(copy_id, num_pages))


def read_copy(record: Record) -> tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The number of a copy, its sources and its targets."""
    copy_id, num_pages = record.words[:2]
    pages = record.body.view(np.int32)
    return copy_id, pages[:num_pages], pages[num_pages:]


def _pack_assignment(it: SlotAssignment) -> bytes:
    return _encoder.encode(
        _Assignment(
            slot=it.slot,
            use=it.use,
            sampling=it.sampling,
            token_ids=pack_ids(it.token_ids),
            num_prompt_tokens=it.num_prompt_tokens,
            stop_token_ids=it.stop_token_ids,
            logprobs=it.logprobs,
            pooling=it.pooling,
            adapter=it.adapter,
        )
    )
