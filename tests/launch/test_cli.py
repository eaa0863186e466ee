"""The command line: every server argument has an option, mistakes are sentences, and help is instant."""

import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from headwater.launch import serve as serve_module
from headwater.launch.cli import app
from headwater.launch.config import FLAGS, ServerArgs, flag_name


def run(*arguments: str, **env: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", **env})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerArgs]:
    """The arguments `headwater serve` was called with; nothing is served."""
    calls: list[ServerArgs] = []
    monkeypatch.setattr(serve_module, "serve", lambda args: calls.append(args) or 0)
    return calls


def test_serve_without_options_uses_the_defaults(served: list[ServerArgs]) -> None:
    assert run("serve").exit_code == 0
    assert served == [ServerArgs()]


def test_options_reach_the_server(served: list[ServerArgs]) -> None:
    result = run(
        "serve", "--model-path", "x.gguf", "--page-size", "32", "--disable-radix-cache", "--dtype", "float32"
    )
    assert result.exit_code == 0, result.output
    assert served == [ServerArgs(model="x.gguf", page_size=32, disable_radix_cache=True, dtype="float32")]


def test_keys_can_come_from_the_environment(served: list[ServerArgs]) -> None:
    run("serve", HEADWATER_API_KEY="user", HEADWATER_ADMIN_API_KEY="admin")
    assert (served[0].api_key, served[0].admin_api_key) == ("user", "admin")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--page-size", "0"), "--page-size must be an integer from 1 to 1024, got 0"),
        (("--dtype", "int8"), "float32"),
        (("--page-sise", "16"), "--page-sise"),
        (("--port", "abc"), "--port"),
    ],
)
def test_a_wrong_option_is_refused_with_a_sentence(
    served: list[ServerArgs], arguments: tuple[str, ...], says: str
) -> None:
    result = run("serve", *arguments)
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output
    assert served == []


def test_help_tells_of_every_argument() -> None:
    shown = run("serve", "--help").output
    for name in FLAGS:
        assert flag_name(name) in shown


@pytest.mark.parametrize("command", ["serve", "chat", "flush", "models", "version"])
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version() -> None:
    assert run("version").stdout.startswith("headwater 0.")


@pytest.mark.parametrize("statement", ["import headwater", "import headwater.launch.cli"])
def test_nothing_heavy_is_imported_for_help(statement: str) -> None:
    """Torch alone takes over a second: `headwater --help` and `import headwater` must not pay for it."""
    heavy = "{'torch', 'transformers', 'tokenizers', 'fastapi', 'zmq', 'gguf'}"
    code = f"{statement}\nimport sys\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_python_api_has_no_other_names() -> None:
    import headwater

    assert {"Engine", "ServerArgs"} <= set(dir(headwater))
    with pytest.raises(AttributeError, match="Motor"):
        _ = headwater.Motor


def test_the_api_process_imports_no_torch() -> None:
    """It would cost every server a second of start-up and 300 MB; the engine process alone computes."""
    code = (
        "import headwater.launch.api_process, sys\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
