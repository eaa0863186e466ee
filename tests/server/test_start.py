"""The start of a server: what each process imports, and in which order the parent does its work."""

import json
import subprocess
import sys

import pytest

NEVER = {"torch", "transformers", "gguf", "redis", "rich", "huggingface_hub"}
NEVER_IN = {
    "headwater.launch.assembly": NEVER | {"asyncio", "tokenizers", "click"},
    "headwater.server.api_process": NEVER | {"numpy"},
}
RECORDS_THE_ORDER = """
import asyncio, pathlib, sys
from headwater.launch.config import ServerArgs
from headwater.server import serve

async def start(self):
    print({"numpy", "pydantic", "fastapi", "zmq", "tokenizers", "rich"} & set(sys.modules))
    raise OSError("started")

serve.EngineSupervisor.start = start
directory = pathlib.Path("/nowhere")
asyncio.run(serve.run_server(ServerArgs(), listener=None, directory=directory, on_ready=lambda: None))
"""


@pytest.mark.parametrize("process", NEVER_IN)
def test_a_process_imports_nothing_heavy_that_a_plain_server_never_uses(process: str) -> None:
    """The client of Redis was a third of the engine's imports; the hub's client brought a second HTTP library."""
    code = f"import {process}, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(set(json.loads(done.stdout)) & NEVER_IN[process]) == []


def test_the_engine_is_started_before_the_parent_imports_the_web_framework() -> None:
    """Both processes work side by side then: the engine loads while the parent imports."""
    done = subprocess.run([sys.executable, "-c", RECORDS_THE_ORDER], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr
    assert "OSError: started" in done.stderr


def test_the_web_framework_builds_its_openapi_models_only_for_the_page_that_shows_them() -> None:
    """They were a fifteenth of the API process's start. Our own models are built: requests use them."""
    code = (
        "import headwater.server.api_process\n"
        "from fastapi.openapi.models import OpenAPI\n"
        "from headwater.http_api.openai.schemas import ChatCompletionRequest\n"
        "print(OpenAPI.__pydantic_complete__, ChatCompletionRequest.__pydantic_complete__)\n"
        "OpenAPI(openapi='3.1.0', info={'title': 'x', 'version': '1'}, paths={})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False True", done.stderr
    assert done.returncode == 0, done.stderr
