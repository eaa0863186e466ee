"""Steps with prompts padded to the shape of a CUDA graph, in numbers on the host."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("torch")

from headwater.devices.cuda.prefill_tiles import plan_tiles  # noqa: E402
from headwater.execution.prompt_steps import launch_bound_tokens, prompt_graph_sizes  # noqa: E402
from headwater.execution.step_inputs import MixedArrays, MixedShape, flatten, idle, pad  # noqa: E402
from headwater.scheduling.plan import NEWEST_TOKEN, StepPlan  # noqa: E402

PADDING_SLOT = 9
SHAPE = MixedShape(num_decodes=4, num_tokens=16, num_tiles=6, num_joins=2)


def _arrays() -> MixedArrays:
    """Decodes in slots 5 and 2; chunks of 3 and 6 tokens in slots 7 and 0, of which the second does not sample."""
    plan = StepPlan(
        step_id=0,
        assignments=(),
        page_updates=(),
        slots=np.array([5, 2, 7, 0], dtype=np.int32),
        uses=np.ones(4, dtype=np.int64),
        num_computed=np.array([10, 3, 0, 20], dtype=np.int32),
        num_tokens=np.array([1, 1, 3, 6], dtype=np.int32),
        samples=np.array([True, True, True, False]),
        token_ids=np.array([NEWEST_TOKEN, NEWEST_TOKEN, *range(100, 109)], dtype=np.int32),
        num_decodes=2,
        num_outputs=np.zeros(4, dtype=np.int32),
    )
    sampled = np.flatnonzero(plan.samples).astype(np.int32)
    return flatten(plan, sampled, plan_tiles=lambda lens, ends: plan_tiles(lens, ends, num_queries=4, max_pieces=1))


def test_padding_comes_behind_the_decodes_and_behind_the_prompts() -> None:
    """What is behind the decodes moves: a row's first token, and the tokens whose hidden states are sampled from."""
    padded = pad(_arrays(), SHAPE, padding_slot=PADDING_SLOT)
    assert padded.decode_slots.tolist() == [5, 2, 9, 9]
    assert padded.decode_positions.tolist() == [10, 3, -1, -1]
    assert padded.token_ids.tolist() == [*range(100, 109), *[0] * 7]
    assert padded.token_slots.tolist() == [7] * 3 + [0] * 6 + [PADDING_SLOT] * 7
    assert padded.token_positions.tolist() == [0, 1, 2, *range(20, 26), *[-1] * 7]
    assert padded.starts[:2].tolist() == [4, 7]
    assert padded.lens.tolist() == [3, 6, 0, 0, 0, 0]
    assert padded.contexts[:2].tolist() == [3, 26]
    assert len(padded.tiles) == 6 and not padded.tiles[3:].any() and (padded.tiles[:3, 3] > 0).all()
    assert padded.last_tokens.tolist() == [0, 1, 6]
    assert padded.sampled_slots.tolist() == [5, 2, 7]


def test_a_draft_is_one_chunk_between_the_decodes_and_the_prompts() -> None:
    """Rows sample in the plan's order, whatever the order of their tokens in the step."""
    plan = StepPlan(
        step_id=0,
        assignments=(),
        page_updates=(),
        slots=np.array([5, 5, 5, 2, 8, 8, 7], dtype=np.int32),
        uses=np.ones(7, dtype=np.int64),
        num_computed=np.array([10, 11, 12, 3, 20, 21, 0], dtype=np.int32),
        num_tokens=np.array([1, 1, 1, 1, 1, 1, 4], dtype=np.int32),
        samples=np.ones(7, dtype=np.bool_),
        token_ids=np.array([50, 51, 52, NEWEST_TOKEN, 80, 81, *range(100, 104)], dtype=np.int32),
        num_decodes=6,
        num_outputs=np.zeros(7, dtype=np.int32),
    )
    sampled = np.arange(7, dtype=np.int32)
    arrays = flatten(plan, sampled, plan_tiles=lambda lens, ends: plan_tiles(lens, ends, num_queries=4, max_pieces=1))
    assert (arrays.decode_slots.tolist(), arrays.decode_positions.tolist()) == ([2], [3])
    assert arrays.token_ids.tolist() == [50, 51, 52, 80, 81, *range(100, 104)]
    assert arrays.token_positions.tolist() == [10, 11, 12, 20, 21, *range(4)]
    assert arrays.token_slots.tolist() == [5, 5, 5, 8, 8, 7, 7, 7, 7]
    chunks = (arrays.slots.tolist(), arrays.starts.tolist(), arrays.lens.tolist(), arrays.contexts.tolist())
    assert chunks == ([5, 8, 7], [1, 4, 6], [3, 2, 4], [13, 22, 4])
    assert arrays.last_tokens.tolist() == [1, 2, 3, 0, 4, 5, 9]
    assert arrays.sampled_slots.tolist() == plan.slots.tolist()


def test_steps_of_one_shape_have_arrays_of_one_size() -> None:
    """A graph reads each array where it lay at the capture."""
    nothing = idle(SHAPE, padding_slot=PADDING_SLOT)
    padded = pad(_arrays(), SHAPE, padding_slot=PADDING_SLOT)
    assert [it.shape for it in nothing.padded] == [it.shape for it in padded.padded]
    assert all(it.dtype == np.int32 for it in (*nothing.padded, *padded.padded, padded.last_tokens))
    assert (nothing.token_positions == -1).all() and (nothing.decode_positions == -1).all()
    assert not nothing.tiles.any() and not nothing.joins.any()


@pytest.mark.parametrize(
    "shape", [MixedShape(1, 16, 6, 2), MixedShape(4, 8, 6, 2), MixedShape(4, 16, 2, 2)], ids=["rows", "tokens", "tiles"]
)
def test_what_does_not_fit_is_not_padded(shape: MixedShape) -> None:
    assert _arrays().fits(SHAPE)
    assert not _arrays().fits(shape)


def test_graphs_are_of_steps_that_the_card_computes_faster_than_they_are_launched() -> None:
    assert launch_bound_tokens(600_000_000) == 1024
    assert 256 <= launch_bound_tokens(8_000_000_000) < 384
    assert launch_bound_tokens(4_000_000_000, num_ranks=2) == 1024  # a first token of 1,024 took 21 to 36 ms
    sizes = prompt_graph_sizes(max_tokens=300, max_decodes=100)
    assert (0, 256) in sizes and (8, 128) in sizes and (100, 128) in sizes
    assert all(sum(size) <= 300 and size[0] <= 100 for size in sizes)
    assert all(decodes == 0 for decodes, _ in prompt_graph_sizes(max_tokens=300, max_decodes=0))
    assert prompt_graph_sizes(max_tokens=0, max_decodes=8) == ()
