"""A scripted engine for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_under_test import ENGINE_READY

from headwater.client import change_call, fleet, link
from scripted_engine import ScriptedEngine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For engines that do answer: one that is late because the machine is busy is waited for, and not a 504.

    test_all_or_none.py tests that a caller of a silent engine waits no longer than a second beyond its timeout.
    """
    for name in ("PREPARE_GRACE_S", "EXPIRY_GRACE_S", "ANSWER_GRACE_S"):
        longer_s = getattr(change_call, name) + 20
        for module in (change_call, fleet, link):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, longer_s)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedEngine]:
    with ScriptedEngine(f"ipc://{tmp_path}/engine.sock", ready=ENGINE_READY) as engine:
        yield engine
