"""`headwater fleet scale`: a number, or limits between which the fleet scales itself."""

from typing import Any

import pytest
from click.testing import CliRunner

from headwater.cli import fleet
from headwater.cli.command_line import Target


@pytest.mark.parametrize(
    ("named", "models"),
    [
        ((), {}),
        (("m",), {"model": "m"}),
        (("./a=b/m",), {"model": "./a=b/m"}),
        (("a=m",), {"models": [{"name": "a", "model": "m"}]}),
        (("a=/m", "b=n.gguf"), {"models": [{"name": "a", "model": "/m"}, {"name": "b", "model": "n.gguf"}]}),
    ],
)
def test_models_are_named_where_there_are_several(named: tuple[str, ...], models: dict[str, Any]) -> None:
    assert fleet._models(named, None, {}) == models


def test_several_models_without_names_are_refused() -> None:
    for named, options in ((("m", "n"), {}), (("a=m", "n"), {}), (("a=m", "b=n"), {"served_model_name": "c"})):
        with pytest.raises(ValueError, match="--model"):
            fleet._models(named, None, options)


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["3"], "/fleet/scale?replicas=3"),
        (["3", "--model", "a b"], "/fleet/scale?replicas=3, of a b"),
        (["--max", "4"], "/fleet/scale?max_replicas=4"),
        (
            ["--min", "2", "--max", "4", "--target", "0.5"],
            "/fleet/scale?min_replicas=2&max_replicas=4&target_ongoing_requests=0.5",
        ),
    ],
)
def test_what_is_asked_of_the_front(words: list[str], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def ask(method: str, where: str, target: Target) -> None:
        asked.append((method, where if target.model is None else f"{where}, of {target.model}"))

    monkeypatch.setattr(fleet, "ask", ask)
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
