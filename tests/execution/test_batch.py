"""Steps of decodes alone reuse their arrays; each must say what the arrays of a fresh step say."""

import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from msgspec import structs

from headwater.devices.cpu.attention_kernels import BLOCK_KEYS, WorkList, work_list
from headwater.devices.cpu.program import StepArrays
from headwater.execution.batch import DecodeBatch, SlotTable, StepInputs
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import NEWEST_TOKEN, PageUpdate, SlotAssignment, StepPlan

PAGE_SIZE, NUM_SLOTS, MAX_PAGES = 16, 6, 80
KV = np.zeros((1, 1), dtype=np.uint8)


@dataclass
class Decoding:
    """A request in a slot. `pages` is its page table."""

    slot: int
    use: int
    num_computed: int
    pages: list[int]

    def next_updates(self, dice: random.Random) -> list[PageUpdate]:
        """A page for the next token if it needs one; sometimes other pages in place of earlier ones."""
        updates = []
        if self.num_computed // PAGE_SIZE == len(self.pages):
            self.pages.append(dice.randrange(1000))
            updates.append(PageUpdate(self.slot, len(self.pages) - 1, np.array(self.pages[-1:], dtype=np.int32)))
        if dice.random() < 0.05 and self.num_computed > 2 * PAGE_SIZE:
            first = dice.randrange(self.num_computed // PAGE_SIZE - 1)
            self.pages[first : first + 2] = [dice.randrange(1000), dice.randrange(1000)]
            updates.append(PageUpdate(self.slot, first, np.array(self.pages[first : first + 2], dtype=np.int32)))
        return updates


def _plan(requests: list[Decoding], updates: list[PageUpdate]) -> StepPlan:
    num_rows = len(requests)
    return StepPlan(
        step_id=0,
        assignments=(),
        page_updates=tuple(updates),
        slots=np.array([it.slot for it in requests], dtype=np.int32),
        uses=np.array([it.use for it in requests], dtype=np.int64),
        num_computed=np.array([it.num_computed for it in requests], dtype=np.int32),
        num_tokens=np.ones(num_rows, dtype=np.int32),
        samples=np.ones(num_rows, dtype=np.bool_),
        token_ids=np.full(num_rows, NEWEST_TOKEN, dtype=np.int32),
        num_decodes=num_rows,
        num_outputs=np.zeros(num_rows, dtype=np.int32),
    )


def _assert_same(step: StepArrays, fresh: StepInputs) -> None:
    assert step.token_ids.tolist() == fresh.token_ids.tolist()
    assert step.positions.tolist() == fresh.positions.tolist()
    assert step.query_starts.tolist() == fresh.query_starts.tolist()
    assert step.context_lens.tolist() == fresh.context_lens.tolist()
    assert step.selected.tolist() == fresh.last_tokens.tolist()
    for row, context in enumerate(fresh.context_lens.tolist()):
        num_pages = -(-context // PAGE_SIZE)
        assert step.page_tables[row, :num_pages].tolist() == fresh.page_tables[row, :num_pages].tolist()
    assert step.struct.page_tables == step.page_tables.ctypes.data
    assert step.struct.table_stride == step.page_tables.shape[1]
    assert step.struct.num_chunks == len(step.chunks)
    assert step.struct.num_decodes == step.struct.num_sampled == len(fresh.context_lens)


def _assert_covered(step: StepArrays) -> None:
    """Each block of keys of each row is in one chunk, by itself or shared with rows that have the same pages there."""
    computed: list[tuple[int, int]] = []
    for chunk in step.chunks.tolist():
        row, block, is_shared = (chunk >> 32) & 0xFFFF, ((chunk & (1 << 63) - 1) >> 48) - 1, chunk < 0
        num_common = chunk & 0xFFFFFFFF or BLOCK_KEYS
        rows = [row]
        while is_shared and step.next_sharing[rows[-1]] >= 0:
            rows.append(int(step.next_sharing[rows[-1]]))
        blocks = [block] if block >= 0 else range(-(-int(step.context_lens[row]) // BLOCK_KEYS))
        computed += [(one, it) for one in rows for it in blocks]
        if is_shared:
            pages = slice(block * BLOCK_KEYS // PAGE_SIZE, (block * BLOCK_KEYS + num_common) // PAGE_SIZE)
            assert len({step.page_tables[one, pages].tobytes() for one in rows}) == 1
    blocks_of = [-(-context // BLOCK_KEYS) for context in step.context_lens.tolist()]
    assert sorted(computed) == [(row, block) for row, num in enumerate(blocks_of) for block in range(num)]


@pytest.mark.parametrize("seed", range(6))
def test_reused_arrays_say_what_fresh_ones_say(seed: int) -> None:
    """Pages are appended and replaced; rows begin blocks of keys, share prefixes, come and go, and reuse slots."""
    dice = random.Random(seed)
    table = SlotTable(max_running=NUM_SLOTS, max_pages=MAX_PAGES, page_size=PAGE_SIZE)
    make_work = partial(_work, num_threads=dice.choice((1, 4)))
    num_shared = 2 * BLOCK_KEYS + dice.choice((0, 160))
    shared = [dice.randrange(1000) for _ in range(num_shared // PAGE_SIZE)]
    running: list[Decoding] = []
    batch: DecodeBatch | None = None
    num_reused = 0
    for step_id in range(400):
        if len(running) < NUM_SLOTS and (not running or dice.random() < 0.05):
            running.append(_enter(table, running, dice, use=step_id, shared=shared))
        if len(running) > 1 and dice.random() < 0.02:
            running.pop(dice.randrange(len(running)))
        plan = _plan(running, [update for request in running for update in request.next_updates(dice)])
        table.apply(plan)
        if batch is None or not batch.continues(plan):
            batch = DecodeBatch(plan, table, kv=KV, make_work=make_work)
        else:
            num_reused += 1
        step = batch.step(plan)
        _assert_same(step, table.inputs(plan))
        _assert_covered(step)
        table.set_newest(plan.slots, np.array([dice.randrange(50) for _ in running], dtype=np.int32))
        for request in running:
            request.num_computed += 1
    assert num_reused > 300


def _work(
    query_starts: npt.NDArray[np.int32],
    context_lens: npt.NDArray[np.int32],
    page_tables: npt.NDArray[np.int32],
    *,
    num_threads: int,
    num_decodes: int,
) -> WorkList:
    return work_list(
        query_starts,
        context_lens,
        num_heads=4,
        num_kv_heads=2,
        num_threads=num_threads,
        page_tables=page_tables,
        page_size=PAGE_SIZE,
        num_decodes=num_decodes,
    )


def _enter(
    table: SlotTable, running: list[Decoding], dice: random.Random, *, use: int, shared: list[int]
) -> Decoding:
    """A request whose prompt is computed, perhaps with the shared prefix, in a free slot."""
    slot = dice.choice([slot for slot in range(NUM_SLOTS) if slot not in {it.slot for it in running}])
    num_computed = dice.choice((1, 16, 250, 600, 600))
    pages = [dice.randrange(1000) for _ in range(-(-num_computed // PAGE_SIZE))]
    if num_computed == 600:
        pages[: len(shared)] = shared
    assignment = SlotAssignment(
        slot=slot,
        use=use,
        sampling=SamplingParams(),
        token_ids=np.zeros(num_computed, dtype=np.int32),
        num_prompt_tokens=num_computed,
        stop_token_ids=(),
    )
    entered = Decoding(slot, use, num_computed, pages)
    plan = _plan([entered], [PageUpdate(slot, 0, np.array(pages, dtype=np.int32))])
    table.apply(structs.replace(plan, assignments=(assignment,)))
    table.set_newest(np.array([slot]), np.array([dice.randrange(50)], dtype=np.int32))
    return entered


def test_a_slot_without_a_token_has_no_next_step() -> None:
    table = SlotTable(max_running=1, max_pages=4, page_size=PAGE_SIZE)
    plan = _plan([Decoding(0, 1, 3, [0])], [PageUpdate(0, 0, np.zeros(1, dtype=np.int32))])
    table.apply(plan)
    with pytest.raises(AssertionError, match="sampled none"):
        DecodeBatch(plan, table, kv=KV, make_work=partial(_work, num_threads=1)).step(plan)


def test_another_use_of_the_slots_is_another_batch() -> None:
    """It may be a request with other sampling parameters."""
    table = SlotTable(max_running=2, max_pages=4, page_size=PAGE_SIZE)
    rows = [Decoding(0, 1, 3, [0]), Decoding(1, 1, 3, [1])]
    batch = DecodeBatch(_plan(rows, []), table, kv=KV, make_work=partial(_work, num_threads=1))
    assert batch.continues(_plan(rows, []))
    assert not batch.continues(_plan(rows[:1], []))
    assert not batch.continues(_plan(rows[::-1], []))
    assert not batch.continues(_plan([rows[0], Decoding(1, 2, 3, [1])], []))
