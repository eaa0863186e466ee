"""One server with the default model, shared by the tests that only talk to it."""

from collections.abc import Iterator

import pytest
from running_server import RunningServer
from tiered import DEVICE, NUM_PROMPTS, ask, write_byte_tokenizer

from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running.wait_healthy()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random model that computes in no time; its tokenizer knows bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model("llama", folder)
    write_byte_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def expected(tiny_model: str) -> list[list[int]]:
    """Output ids of every prompt of tiered.py, by a server without any cache."""
    with RunningServer("--model", tiny_model, *DEVICE, "--disable-radix-cache").wait_healthy() as plain:
        return [ask(plain, number)["output_ids"] for number in range(NUM_PROMPTS)]
