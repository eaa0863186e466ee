"""A second model of the same shapes, whose texts are known."""

import pytest
from tiered import SAMPLING, prompt, write_byte_tokenizer

from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Other weights of the same shapes."""
    folder = tmp_path_factory.mktemp("other")
    make_tiny_model("llama", folder, seed=5)
    write_byte_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_expected(other_model: str) -> list[list[int]]:
    from headwater import Engine  # here: it imports torch

    with Engine(other_model, dtype="float32", disable_radix_cache=True, log_level="warning") as plain:
        return [plain.generate(input_ids=prompt(n), sampling_params=SAMPLING)["output_ids"] for n in range(4)]
