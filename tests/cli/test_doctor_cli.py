"""`headwater doctor`: the screen, the JSON and the exit code, and that it is light."""

import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from headwater.cli.main import app
from headwater.doctor import report as report_module
from headwater.doctor.finding import Finding, Level
from headwater.doctor.report import Report

FINDINGS = (
    Finding("version", "Headwater 0.1.0", facts={"python": "3.11"}),
    Finding("port", "30000: Address already in use", Level.NOTE, "take another --port"),
)
SUBJECTS = ["version", "processor", "kernels", "speed", "memory", "gpu", "torch", "model", "disk", "port"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"NO_COLOR": "1"})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each examination, which finds FINDINGS."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(report_module, "examine", lambda **wanted: calls.append(wanted) or Report(FINDINGS))
    return calls


def test_the_screen_has_a_line_for_each_finding_and_its_remedy(asked: list[dict[str, Any]]) -> None:
    result = run("--model", "x.gguf", "--port", "4")
    assert result.exit_code == 0, "a note is no problem"
    assert result.output.splitlines() == [
        "ok       version    Headwater 0.1.0",
        "note     port       30000: Address already in use",
        "                    -> take another --port",
    ]
    assert asked == [{"model_name": "x.gguf", "port": 4, "storage": None}]


def test_a_store_is_tried_if_it_is_named(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_STORAGE_URL", "redis://elsewhere")
    run("--hicache-storage-backend", "file", "--hicache-storage-dir", "/pages")
    run("--hicache-storage-backend", "redis")
    file, redis = (call["storage"] for call in asked)
    assert (file.kind, file.directory, file.url) == ("file", "/pages", None)
    assert (redis.kind, redis.url) == ("redis", "redis://elsewhere")


def test_json_has_the_facts(asked: list[dict[str, Any]]) -> None:
    found = json.loads(run("--json").output)
    assert found["has_problems"] is False
    assert found["findings"][0]["facts"] == {"python": "3.11"}
    assert found["findings"][1] == {
        "subject": "port",
        "level": "note",
        "text": "30000: Address already in use",
        "remedy": "take another --port",
        "facts": {},
    }


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_problem_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, option: list[str]) -> None:
    problem = Finding("disk", "full", Level.PROBLEM, "free some space")
    monkeypatch.setattr(report_module, "examine", lambda **_: Report((*FINDINGS, problem)))
    result = run(*option)
    assert result.exit_code == 1
    assert "free some space" in result.output


def test_the_real_examination_covers_everything_and_imports_no_torch() -> None:
    code = (
        "import json, sys\n"
        "from headwater.doctor.report import examine\n"
        "report = examine(port=0).as_json()\n"
        "heavy = sorted({'torch', 'transformers', 'tokenizers', 'fastapi', 'zmq'} & set(sys.modules))\n"
        "print(json.dumps([report, heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report, heavy = json.loads(done.stdout)
    assert [finding["subject"] for finding in report["findings"]] == SUBJECTS
    assert heavy == []
