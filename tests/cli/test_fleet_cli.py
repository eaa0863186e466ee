"""`headwater fleet scale`: a number, or limits between which the fleet scales itself."""

from typing import Any

import pytest
from click.testing import CliRunner

from headwater.cli import fleet


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["3"], "/fleet/scale?replicas=3"),
        (["--max", "4"], "/fleet/scale?max_replicas=4"),
        (
            ["--min", "2", "--max", "4", "--target", "0.5"],
            "/fleet/scale?min_replicas=2&max_replicas=4&target_ongoing_requests=0.5",
        ),
    ],
)
def test_what_is_asked_of_the_front(words: list[str], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(fleet, "ask", lambda method, where, **_: asked.append((method, where)))
    ended = CliRunner().invoke(fleet.fleet, ["scale", *words])
    assert ended.exit_code == 0, ended.output
    assert asked == [("POST", path)]


@pytest.mark.parametrize("words", [[], ["3", "--max", "4"], ["--min", "2"], ["3", "--target", "2"]])
def test_contradictions_are_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is asked")

    monkeypatch.setattr(fleet, "ask", never)
    ended = CliRunner().invoke(fleet.fleet, ["scale", *words])
    assert ended.exit_code == 2
    assert "replicas" in ended.output
