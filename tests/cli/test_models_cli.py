"""`headwater models list|pull|path`."""

import hashlib

import pytest
from click.testing import CliRunner

from headwater.cli import models as models_cli
from headwater.launch import default_model
from headwater.launch.default_model import DEFAULT_MODEL_NAME, PackagedModel, model_path

CONTENT = b"GGUF tiny"
MODEL = PackagedModel(
    name=DEFAULT_MODEL_NAME,
    requirement="not-on-any-index==0",
    file_name="tiny.gguf",
    file_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_bytes=1,
    license="Apache-2.0",
    origin="made in a test\n",
)


@pytest.fixture(autouse=True)
def _small_model_in_an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    monkeypatch.setattr(models_cli, "PACKAGED_MODELS", {MODEL.name: MODEL})


def run(*arguments: str):
    return CliRunner().invoke(models_cli.models, list(arguments))


def put_model_into_cache() -> None:
    model_path(MODEL).parent.mkdir(parents=True)
    model_path(MODEL).write_bytes(CONTENT)


def test_list_shows_what_there_is_and_what_is_here():
    before = run("list")
    put_model_into_cache()
    after = run("list")
    assert before.exit_code == after.exit_code == 0
    header, row = after.stdout.splitlines()
    assert header.split() == ["NAME", "SIZE", "LICENCE", "PRESENT", "PATH"]
    assert row.split() == [MODEL.name, "0", "MB", "Apache-2.0", "yes", str(model_path(MODEL))]
    assert before.stdout.splitlines()[1].split()[4] == "no"


def test_path_prints_the_path_alone_for_scripts():
    put_model_into_cache()
    result = run("path")
    assert result.exit_code == 0
    assert result.stdout == f"{model_path(MODEL)}\n"


def test_path_of_a_missing_model_fails_without_output():
    """`--model $(headwater models path)` must not go on with a path where nothing is."""
    result = run("path", MODEL.name)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"headwater models pull {MODEL.name}" in result.stderr


def test_pull_of_a_present_model_prints_its_path_and_asks_no_network(monkeypatch):
    put_model_into_cache()
    monkeypatch.setattr(default_model, "_download_wheel", lambda *_, **__: pytest.fail("pip was called"))
    result = run("pull")
    assert result.exit_code == 0
    assert result.stdout == f"{model_path(MODEL)}\n"


def test_pull_that_fails_exits_with_1_and_the_reason(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network here")

    monkeypatch.setattr(default_model, "_download_wheel", fail)
    result = run("pull")
    assert result.exit_code == 1
    assert "no network here" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["pull", "path"])
def test_an_unknown_name_lists_the_known_ones(command):
    result = run(command, "gpt-9")
    assert result.exit_code == 2
    assert MODEL.name in result.stderr
