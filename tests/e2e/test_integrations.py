"""The scripts under integrations/: they run, their pages exist, and a client's checks find what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running_server import RunningServer

pytestmark = pytest.mark.xdist_group("default server")

ROOT = Path(__file__).parents[2]
INTEGRATIONS = ROOT / "integrations"
sys.path.insert(0, str(INTEGRATIONS))

from clients import CLIENTS  # noqa: E402
from record import RESULTS, saved  # noqa: E402
from scripted_answers import answer_to  # noqa: E402


def run(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, INTEGRATIONS / "run.py", *arguments, "--here"],
        env=os.environ | {"HEADWATER_URL": url},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_the_openai_sdk_passes_every_check(server: RunningServer) -> None:
    """On the default model and on the scripted one: tools, schemas, streams, errors, and the code of its page."""
    ran = run("openai-python", url=server.url)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]


@pytest.mark.slow
def test_a_check_that_fails_is_reported() -> None:
    """A server that is not there fails the client, and the exit code says so."""
    ran = run("openai-python", "--only", "chat", url="http://127.0.0.1:9")
    assert ran.returncode == 1, ran.stdout
    assert "openai-python: end failed" in ran.stdout


def test_every_client_has_a_script_and_a_page() -> None:
    assert not [client.script for client in CLIENTS if not (INTEGRATIONS / client.script).is_file()]
    pages = {page.stem for page in (ROOT / "docs" / "clients").glob("*.md")}
    assert {client.name for client in CLIENTS} - {"sglang-kits"} == pages - {"index"}


def test_kept_results_belong_to_clients_and_name_no_folder_of_a_machine() -> None:
    alone = {"ray-serve-llm", "prometheus"}  # scripts that integrations/run.py does not start
    names = {client.name for client in CLIENTS} | alone
    for record in saved():
        assert record["client"] in names
        assert record["passed"] + record["failed"] + record["skipped"] == len(record["checks"])
        assert all(check["reason"] for check in record["checks"] if check["result"] != "passed"), record["client"]
    for file in RESULTS.glob("*.json"):
        text = file.read_text()
        assert not [path for path in (Path.home(), ROOT) if f"{path}/" in text], file.name


def test_the_scripted_model_answers_by_the_last_message() -> None:
    def prompt(*turns: tuple[str, str]) -> str:
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return f"{text}<|im_start|>assistant\n"

    tools = ("system", "# Tools\n<tools>\n{}\n</tools>")
    question = ("user", "the weather in Paris and the weather in Rome")
    calls = answer_to(prompt(tools, question))
    cities = [json.loads(line)["arguments"]["city"] for line in calls.splitlines() if line.startswith("{")]
    assert cities == ["Paris", "Rome"]
    assert answer_to(prompt(question)) == f"You said: {question[1]}"
    result = ("tool", "<tool_response>\n21 degrees\n</tool_response>")
    assert answer_to(prompt(tools, question, ("assistant", calls), result)) == "The tool says: 21 degrees"
