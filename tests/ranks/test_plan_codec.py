"""What a rank reads is the plan that the engine wrote, whatever it holds."""

import os
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.messages.generation import LogprobParams, SamplingParams
from headwater.ranks import plan_codec
from headwater.ranks.plan_codec import Kind
from headwater.ranks.plan_stream import PlanStream, StreamReader, ring_bytes
from headwater.ranks.shared_memory import SharedMemory
from headwater.scheduling.plan import PageCopy, PageUpdate, SlotAssignment, StepPlan


class Line:
    """A stream with one reader, in one process."""

    def __init__(self) -> None:
        self.pipe = os.pipe()
        size = ring_bytes(1, largest_body=1 << 20)
        memory = SharedMemory.create(size)
        self.writer = PlanStream(memory, [self.pipe[1]])
        self.reader = StreamReader(SharedMemory(os.dup(memory.fd), size), self.pipe[0], index=0, num_readers=1)

    def take_plan(self) -> StepPlan:
        assignments = []
        while True:
            record = self.reader.take()
            assert record is not None
            if record.kind == Kind.STEP:
                return plan_codec.read_plan(record, assignments)
            assert record.kind == Kind.ASSIGN
            assignments.append(plan_codec.read_assignment(record))


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    found = Line()
    yield found
    for fd in found.pipe:
        os.close(fd)


def same(left: object, right: object) -> bool:
    """Whether two plans, or parts of them, hold the same: their structs compare by identity."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.shape == right.shape and left.dtype == right.dtype and bool((left == right).all())
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, msgspec.Struct) and type(left) is type(right):
        return all(same(getattr(left, name), getattr(right, name)) for name in left.__struct_fields__)
    return left == right


numbers = st.integers(0, 2**31 - 1)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    num_rows, num_decodes = draw(st.integers(1, 5)), draw(st.integers(0, 5))
    num_tokens = np.array([1 if row < num_decodes else draw(st.integers(1, 9)) for row in range(num_rows)], np.int32)

    def ints(num: int) -> np.ndarray:
        return np.array(draw(st.lists(numbers, min_size=num, max_size=num)), dtype=np.int32)

    return StepPlan(
        step_id=draw(st.integers(-1, 2**62)),
        assignments=tuple(
            SlotAssignment(
                slot=slot,
                use=2**40 + slot,
                sampling=SamplingParams(temperature=0.5, logit_bias={3: 1.5}, seed=2**62, stop_token_ids=(1, 2)),
                token_ids=ints(draw(st.integers(0, 50))),
                num_prompt_tokens=draw(numbers),
                stop_token_ids=(7,) * slot,
                logprobs=LogprobParams(top=2, token_ids=(1,)) if slot else None,
                pooling="mean" if slot == 2 else None,
            )
            for slot in range(draw(st.integers(0, 3)))
        ),
        page_updates=tuple(
            PageUpdate(slot=draw(numbers), first=draw(numbers), pages=ints(draw(st.integers(0, 4))))
            for _ in range(draw(st.integers(0, 4)))
        ),
        slots=ints(num_rows),
        uses=np.arange(num_rows, dtype=np.int64) + 2**50,
        num_computed=ints(num_rows),
        num_tokens=num_tokens,
        samples=np.array(draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)), dtype=np.bool_),
        token_ids=ints(int(num_tokens.sum())) - 1,
        num_decodes=min(num_decodes, num_rows),
        num_outputs=ints(num_rows),
        page_copies=tuple(PageCopy(draw(numbers), draw(numbers), 5) for _ in range(draw(st.integers(0, 3)))),
        grammar_rows=np.flatnonzero(num_tokens == 1).astype(np.int32),
    )


@given(written=st.lists(plans(), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_plans_arrive_as_they_were_written(line: Line, written: list[StepPlan]) -> None:
    """A field left out, two arrays in the wrong order, an assignment that goes to the wrong step."""
    for plan in written:
        plan_codec.write_plan(line.writer, plan)
    assert all(same(line.take_plan(), plan) for plan in written)


def test_what_was_read_stays_when_the_ring_is_written_again(line: Line) -> None:
    """A runner keeps arrays of a plan over steps, on a GPU until its step has run."""
    pages = np.arange(1000, dtype=np.int32)
    plan_codec.write_copy(line.writer, Kind.OFFLOAD, 1, pages, pages + 1)
    record = line.reader.take()
    assert record is not None
    copy_id, sources, targets = plan_codec.read_copy(record)
    for number in range(600):  # 600 * 8 kB go round the ring
        plan_codec.write_copy(line.writer, Kind.RESTORE, number, pages * 0, pages * 0)
        line.reader.take()
    assert copy_id == 1 and same(sources, pages) and same(targets, pages + 1)
