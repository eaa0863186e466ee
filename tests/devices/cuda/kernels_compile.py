"""The Triton kernels compile for a card and fit on it. The interpreter takes Python that the compiler does not.

`make test-isa` runs this file, `make test` does not: the compiler takes a minute of CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 900  # a minute or two of CPU, on cores that others use
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]

pytest.importorskip("triton")

MAX_SHARED_BYTES = 227 << 10  # of a block on a Hopper card
ATTENTION = {
    "_write_entries_kernel",
    "_decode_kernel",
    "_write_kernel",
    "_prefill_kernel",
    "_join_kernel",
    "_gather_kernel",
}
KERNELS = {
    "bfloat16": ATTENTION,
    "bfloat16-large-heads": ATTENTION,
    "float32": ATTENTION,
    "float32-large-heads": ATTENTION,
    "float8": ATTENTION,
    "layers": {"_norm_kernel", "_square_sums_kernel", "_activate_mul_kernel", "_skinny_kernel", "_stream_kernel"},
    "coded": {
        "_one_token_kernel", "_tiles_kernel", "_int4_kernel", "_int4_numbers_kernel", "_group_sums_kernel",
        "_add_splits_kernel", "_numbers_kernel",
        "_round_kernel", "_one_float8_kernel", "_activate_round_kernel", "_activate_piece_kernel",
        "_round_piece_kernel", "_add_norm_kernel", "_norm_kernel", "_activate_mul_kernel",
    },
    "deterministic": {
        "_write_entries_kernel", "_write_kernel", "_prefill_kernel", "_linear_kernel", "_activate_mul_kernel",
        "_logsumexp_kernel",
    },
    "adapters": {"_plan_kernel", "_shrink_kernel", "_expand_kernel", "_gated_kernel", "_skinny_kernel"},
    "experts": {
        "_few_gated_kernel", "_few_sums_kernel", "_route_kernel", "_plan_kernel", "_grouped_kernel", "_sum_kernel",
        "_norm_kernel",
    },
    "experts in order": {"_route_kernel", "_order_kernel", "_sum_kernel", "_add_norm_kernel"},
    "sampling": {
        "_greedy_kernel", "_allowed_kernel", "_draw_kernel", "_write_entries_kernel", "_copy_pages", "_copy_heads",
    },
    "ranks": {"_one_shot_kernel"},
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int] | str]:
    """By a process of its own: kernels are interpreted or compiled by what the environment says at their import."""
    shared = str(Path(__file__).parents[2])  # attention_setting.py
    path = os.pathsep.join(filter(None, (shared, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("absent_card.py"))],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("group", KERNELS)
def test_kernels_compile_and_fit(group: str, compiled: dict[str, dict[str, int] | str]) -> None:
    sizes = compiled[group]
    assert isinstance(sizes, dict), sizes
    assert sizes.keys() == KERNELS[group]
    assert max(sizes.values()) <= MAX_SHARED_BYTES, sizes


def test_rows_of_a_large_matrix_are_read_ahead(compiled: dict[str, dict[str, int] | str]) -> None:
    """Rows on their way lie in shared memory; two programs have room in a multiprocessor."""
    sizes = compiled["layers"]
    assert isinstance(sizes, dict), sizes
    assert 2 * (16 << 10) < sizes["_stream_kernel"] <= MAX_SHARED_BYTES // 2
