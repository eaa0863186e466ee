"""A second model of the same shapes, whose texts are known; models that eight ranks can share."""

import os

import pytest
from tiered import SAMPLING, prompt, write_tiny_llama

from headwater import Engine

# eight ranks: two of them hold the same KV head
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4}
SHAPE = WIDE if int(os.environ.get("HEADWATER_TEST_RANKS", "2")) > 4 else {}


def _make(tmp_path_factory: pytest.TempPathFactory, name: str, *, seed: int = 0, **changes: int) -> str:
    folder = tmp_path_factory.mktemp(name)
    write_tiny_llama(folder, seed=seed, **changes)
    return str(folder)


if SHAPE:

    @pytest.fixture(scope="session")
    def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
        return _make(tmp_path_factory, "tiny", **SHAPE)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _make(tmp_path_factory, "wide", **WIDE)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Other weights of the same shapes."""
    return _make(tmp_path_factory, "other", seed=5, **SHAPE)


@pytest.fixture(scope="session")
def other_expected(other_model: str) -> list[list[int]]:
    with Engine(other_model, dtype="float32", disable_radix_cache=True, log_level="warning") as plain:
        return [plain.generate(input_ids=prompt(n), sampling_params=SAMPLING)["output_ids"] for n in range(4)]
