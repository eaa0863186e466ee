"""The tests of the front notice fronts that are wrong in known ways; docs/mutants.md lists them."""

import inspect
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from front_mutants import FRONT_MUTANTS, NOTICED_BY, Check

from headwater.fleet import proxy

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.mutants]  # the tests of tensors need torch
PAGE = Path(__file__).parents[2] / "docs" / "mutants.md"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_of(check: Check) -> Any:
    return check.func if isinstance(check, partial) else check


test_of.__test__ = False  # type: ignore[attr-defined]


@asynccontextmanager
async def fixtures(check: Check, known: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The arguments of a test: `known` ones, and fixtures of its own module."""
    module = sys.modules[test_of(check).__module__]
    given = set(check.keywords) if isinstance(check, partial) else set()
    async with AsyncExitStack() as stack:
        found = {}
        for name in set(inspect.signature(test_of(check)).parameters) - given:
            if name in known:
                found[name] = known[name]
                continue
            make = inspect.unwrap(getattr(module, name))
            needs = {each: known[each] for each in inspect.signature(make).parameters}
            found[name] = await stack.enter_async_context(asynccontextmanager(make)(**needs))
        yield found


async def judge(check: Check, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(proxy, "HOLD_S", 0.5)  # what finds no replica need not be waited for
        known = {"tmp_path": folder, "monkeypatch": monkeypatch}
        async with fixtures(check, known) as arguments:
            await check(**arguments)


@pytest.mark.parametrize("name", FRONT_MUTANTS)
async def test_every_mutant_is_noticed(name: str, tmp_path: Path) -> None:
    with FRONT_MUTANTS[name].in_force(), pytest.raises(AssertionError):
        await judge(NOTICED_BY[name], tmp_path)


@pytest.mark.parametrize(
    "check", dict.fromkeys(NOTICED_BY.values()), ids=lambda check: test_of(check).__name__.removeprefix("test_")
)
async def test_the_true_front_passes_in_the_same_way(check: Check, tmp_path: Path) -> None:
    """Else a mutant is noticed by something that it has not broken."""
    await judge(check, tmp_path)


def test_the_page_lists_them() -> None:
    section = PAGE.read_text().partition("## Mutants of a fleet's front")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| `(\w+)` \|$", section, re.MULTILINE)
    wanted = [(each.breaks, test_of(NOTICED_BY[name]).__name__) for name, each in FRONT_MUTANTS.items()]
    assert rows == wanted
