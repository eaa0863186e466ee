"""The command `llm` with the server in its own file of models: prompts, streams, schemas, tools."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from checks import Server, check, run_checks

TOOL = "def get_weather(city: str) -> str:\n    'The weather in a city'\n    return '21 degrees'\n"


def llm(server: Server, *arguments: str, max_tokens: int = 24) -> subprocess.CompletedProcess:
    folder = Path(tempfile.mkdtemp(dir=os.getcwd()))
    settings = {
        "model_id": "served",
        "model_name": server.model,
        "api_base": server.v1,
        "supports_schema": True,
        "supports_tools": True,
    }
    (folder / "extra-openai-models.yaml").write_text(json.dumps([settings]))  # JSON is YAML
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = ("-o", "temperature", "0", "-o", "max_tokens", str(max_tokens), "--key", "unused")
    return subprocess.run(
        ["llm", "prompt", "-m", "served", *options, *arguments],
        env=environment | {"LLM_USER_PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=80,
    )


def text_of(ran: subprocess.CompletedProcess) -> str:
    assert ran.returncode == 0, ran.stderr[-400:]
    return ran.stdout


@check("chat")
def chat(server: Server) -> None:
    assert text_of(llm(server, "--no-stream", "Why is the sky blue?")).strip()


@check("stream")
def stream(server: Server) -> None:
    streamed = text_of(llm(server, "Why is the sky blue?"))
    assert streamed.strip() == text_of(llm(server, "--no-stream", "Why is the sky blue?")).strip()


@check("tools auto", on="scripted")
def tools_auto(server: Server) -> None:
    """The command calls the function and sends its result by itself."""
    said = text_of(llm(server, "--functions", TOOL, "What is the weather in Paris?", max_tokens=200))
    assert "The tool says: 21 degrees" in said


@check("json_schema")
def json_schema(server: Server) -> None:
    schema = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"]}
    schema |= {"additionalProperties": False}
    said = text_of(llm(server, "--no-stream", "--schema", json.dumps(schema), "Is it sunny?", max_tokens=100))
    assert type(json.loads(said)["sunny"]) is bool


@check("errors")
def errors(server: Server) -> None:
    ran = llm(server, "-o", "top_p", "0.5", "-o", "presence_penalty", "2", "-o", "logit_bias", '{"999999": 1}', "Hi")
    assert ran.returncode == 1
    assert "logit_bias" in ran.stderr


if __name__ == "__main__":
    run_checks()
