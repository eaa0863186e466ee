"""`headwater pause | continue | weights | memory` against a scripted server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scripted_http import HttpScript, scripted_http

from headwater.cli.main import app

UPDATED = {
    "message": "Weights updated.",
    "num_tensors": 272,
    "weight_version": "7",
    "weights_id": "abc",
    "num_kept": 2,
    "num_aborted": 0,
}
MEMORY = {"num_bytes": 3 << 20, "released": ["kv_cache"]}
VALUES = {
    "name": "model.norm.weight",
    "dtype": "bfloat16",
    "shape": [576],
    "values": [1.5],
    "engines": [{"dp_rank": 0, "values": [1.5, -2.0]}],
}


@pytest.fixture
def script() -> Iterator[HttpScript]:
    with scripted_http() as script:
        script.answer("/pause_generation", {"num_requests": 3})
        script.answer("/continue_generation", {"status": "ok"})
        script.answer("/update_weights_from_disk", UPDATED)
        script.answer("/get_weight_version", {"weight_version": "6"})
        script.answer("/update_weight_version", {"message": "Weight version updated to 7"})
        script.answer("/get_weights_by_name", VALUES)
        script.answer("/release_memory_occupation", MEMORY)
        script.answer("/resume_memory_occupation", MEMORY | {"released": []})
        yield script


def run(script: HttpScript, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--url", script.url], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("arguments", "path", "body", "words"),
    [
        (["pause"], "/pause_generation", {"mode": "retract"}, "put back into the queue: 3"),
        (["pause", "--mode", "abort"], "/pause_generation", {"mode": "abort"}, "aborted: 3"),
        (["pause", "--mode", "in_place"], "/pause_generation", {"mode": "in_place"}, "frozen: 3"),
        (["continue"], "/continue_generation", {}, "Continued."),
        (["weights", "version"], "/get_weight_version", None, "6"),
        (
            ["weights", "version", "7", "--keep-running"],
            "/update_weight_version",
            {"new_version": "7", "abort_all_requests": False},
            "updated to 7",
        ),
        (
            ["weights", "get", "model.norm.weight", "--num-values", "2"],
            "/get_weights_by_name",
            {"name": "model.norm.weight", "truncate_size": 2},
            "1.5 -2",
        ),
        (
            ["memory", "release", "kv_cache", "--timeout", "5"],
            "/release_memory_occupation",
            {"tags": ["kv_cache"], "timeout": 5.0},
            "Released 3 MiB",
        ),
        (
            ["memory", "resume"],
            "/resume_memory_occupation",
            {"tags": [], "timeout": 600.0},
            "Still released: nothing",
        ),
    ],
)
def test_commands_ask_their_route_and_tell_the_answer(
    script: HttpScript, arguments: list[str], path: str, body: Any, words: str
) -> None:
    result = run(script, *arguments, "--admin-key", "k")
    assert result.exit_code == 0, result.output
    assert words in result.stdout
    (request,) = script.received
    assert (request.path, request.body, request.key) == (path, body, "Bearer k")


def test_a_command_names_one_of_the_models(script: HttpScript) -> None:
    script.answer("/pause_generation?model=a%26b", {"num_requests": 1})
    script.answer("/flush_cache?model=a%26b", "Cache flushed.")
    for arguments in (["pause"], ["flush"]):
        assert run(script, *arguments, "--model", "a&b").exit_code == 0
    assert [request.path.partition("?")[2] for request in script.received] == ["model=a%26b"] * 2


def test_weights_update_sends_a_path_the_server_can_find(script: HttpScript, tmp_path: Path, monkeypatch: Any) -> None:
    """The server has another working directory: a relative path of this shell must be made absolute."""
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path)
    result = run(script, "weights", "update", "new", "--version", "7", "--abort")
    assert result.exit_code == 0
    assert "272 tensors" in result.stdout
    assert "carried over: 2" in result.stdout
    body = script.received[0].body
    assert body["model_path"] == str(tmp_path / "new")
    assert (body["weight_version"], body["abort_all_requests"]) == ("7", True)
    run(script, "weights", "update", "on/the/server")
    assert script.received[1].body["model_path"] == "on/the/server", "a path this machine does not know stays"


@pytest.mark.parametrize(
    ("status", "error", "exit_code", "words"),
    [
        (400, {"message": "not idle", "param": None, "blockers": {"running": 2}}, 1, "Not idle: 2 running requests."),
        (400, {"message": "tag 'x' is not known", "param": "tags"}, 2, "tag 'x'"),
        (403, {"message": "this route needs the admin API key", "param": None}, 1, "--admin-key"),
    ],
)
def test_refusals_are_sentences_with_an_exit_code(
    script: HttpScript, status: int, error: Any, exit_code: int, words: str
) -> None:
    script.answer("/release_memory_occupation", {"error": error}, status=status)
    result = run(script, "memory", "release")
    assert result.exit_code == exit_code
    assert words in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["pause"],
        ["continue"],
        ["flush"],
        ["chat", "hello"],
        ["weights", "update", "x"],
        ["weights", "version"],
        ["weights", "get", "x"],
        ["memory", "release"],
        ["memory", "resume"],
    ],
)
def test_every_command_finds_the_server_by_the_environment(arguments: list[str]) -> None:
    """Whoever serves on another port says so once; --url wins over it."""
    with scripted_http() as script:
        CliRunner().invoke(app, arguments, env={"HEADWATER_URL": script.url})
        assert script.received, "HEADWATER_URL was not read"
        with scripted_http() as other:
            num_before = len(script.received)
            CliRunner().invoke(app, [*arguments, "--url", other.url], env={"HEADWATER_URL": script.url})
            assert other.received
            assert len(script.received) == num_before


def test_a_server_that_is_something_else_is_told_as_such(script: HttpScript) -> None:
    script.answer("/pause_generation", "<html>hello</html>")
    result = run(script, "pause")
    assert result.exit_code == 1
    assert "not like a Headwater server" in result.output


def test_wrong_usage_asks_nobody(script: HttpScript) -> None:
    for arguments in (["pause", "--mode", "nap"], ["weights", "get", "x", "--num-values", "0"], ["weights", "update"]):
        assert run(script, *arguments).exit_code == 2
    assert script.received == []
