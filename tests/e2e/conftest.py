"""One server with the default model, shared by the tests that only talk to it."""

from collections.abc import Iterator

import pytest
from running_server import RunningServer


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running.wait_healthy()
