"""Steps without attention, for tests of recorded programs."""

import numpy as np

from headwater.devices.cpu.program import StepArrays


def step_of(num_tokens: int, selected: tuple[int, ...] = ()) -> StepArrays:
    """One row of `num_tokens` tokens, whose ids are their numbers."""
    return StepArrays(
        token_ids=np.arange(num_tokens, dtype=np.int32),
        positions=np.arange(num_tokens, dtype=np.int32),
        query_starts=np.array([0, num_tokens], dtype=np.int32),
        context_lens=np.array([num_tokens], dtype=np.int32),
        page_tables=np.zeros((1, 1), dtype=np.int32),
        selected=np.array(selected, dtype=np.int32),
        kv=np.zeros((1, 1), dtype=np.uint8),
        chunks=np.zeros(0, dtype=np.int64),
        queries_per_chunk=1,
        partial_slots=np.full(1, -1, dtype=np.int32),
        next_sharing=np.full(1, -1, dtype=np.int32),
        num_decodes=0,
    )
