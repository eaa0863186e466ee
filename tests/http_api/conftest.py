"""A scripted engine for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_under_test import ENGINE_READY

from scripted_engine import ScriptedEngine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedEngine]:
    with ScriptedEngine(f"ipc://{tmp_path}/engine.sock", ready=ENGINE_READY) as engine:
        yield engine
