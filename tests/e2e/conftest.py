"""One server with the default model, shared by the tests that only talk to it."""

from collections.abc import Iterator

import pytest
from running_server import RunningServer
from tiered import NUM_PROMPTS, SAMPLING, prompt, write_tiny_llama

from headwater import Engine


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running.wait_healthy()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random model that computes in no time; its tokenizer knows bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="session")
def expected(tiny_model: str) -> list[list[int]]:
    """Output ids of every prompt of tiered.py, by an engine without any cache."""
    with Engine(tiny_model, dtype="float32", disable_radix_cache=True, log_level="warning") as plain:
        return [
            plain.generate(input_ids=prompt(number), sampling_params=SAMPLING)["output_ids"]
            for number in range(NUM_PROMPTS)
        ]
