"""8-bit keys and values in the whole engine: size, tiers, stores, and what is refused."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from headwater import Engine
from tiny_models import VOCAB_SIZE, make_tiny_model

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
from tiered import write_byte_tokenizer

pytestmark = pytest.mark.slow

PROMPT = np.random.default_rng(3).integers(3, VOCAB_SIZE, 100).tolist()  # 6 whole pages
HEAD_DIM = 16
SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
ARGS = {"dtype": "float32", "max_total_tokens": 512, "max_running_requests": 2, "log_level": "warning"}
EIGHT = ARGS | {"kv_cache_dtype": "fp8_e4m3"}


def ask(engine: Engine) -> tuple[list[int], dict[str, int]]:
    """The answer, and where its prompt was found. Waits until its pages are on every tier."""
    answer = engine.generate(input_ids=PROMPT, sampling_params=SAMPLING)
    give_up_s = time.monotonic() + 60
    while engine.get_state().blockers:
        assert time.monotonic() < give_up_s, engine.get_state().blockers
        time.sleep(0.01)
    return answer["output_ids"], answer["meta_info"]["cached_tokens_details"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model("llama", folder)
    write_byte_tokenizer(folder)
    return str(folder)


def test_pages_of_eight_bits_go_through_the_tiers_and_meet_no_others(model: str, tmp_path: Path) -> None:
    """A page that comes back with other bytes, or without its exponents, changes the text; so would floats."""
    tiers = {
        "model": model,
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "file",
        "hicache_storage_dir": str(tmp_path / "store"),
        "hicache_storage_prefetch_policy": "wait_complete",
    }
    with Engine(**EIGHT, **tiers) as engine:
        computed, details = ask(engine)
        assert not any(details.values())
        assert ask(engine) == (computed, details | {"device": 96})
        assert engine.flush_cache(tiers=["device"], timeout=30).success
        assert ask(engine) == (computed, details | {"host": 96})
        page_bytes = engine.ready.page_bytes
    with Engine(**EIGHT, **tiers) as engine:
        assert ask(engine) == (computed, details | {"storage": 96})
    with Engine(**ARGS, **tiers) as engine:
        in_floats, found = ask(engine)
        assert not any(found.values())
        assert engine.ready.page_bytes == page_bytes // (HEAD_DIM + 1) * HEAD_DIM * 4
    with Engine(model, **ARGS, disable_radix_cache=True) as engine:
        assert ask(engine)[0] == in_floats


def test_another_format_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--kv-cache-dtype must be one of auto, fp8_e4m3, fp8_e5m2, got 'fp4'"):
        Engine(kv_cache_dtype="fp4")
