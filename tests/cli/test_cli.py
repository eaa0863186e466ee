"""The command line: every server argument has an option, mistakes are sentences, and help is instant."""

import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from headwater.cli.main import COMMANDS, app
from headwater.launch.config import FLAGS, ServerArgs
from headwater.launch.flags import flag_name
from headwater.server import serve as serve_module


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


@pytest.mark.parametrize("name", [name for name, spec in FLAGS.items() if spec.type is not bool])
def test_every_option_of_serve_takes_a_value_of_its_type(served: list[ServerArgs], name: str) -> None:
    """An option whose type click cannot call ends `serve` with a traceback: `Literal[...] | None` did."""
    spec = FLAGS[name]
    value = spec.choices[-1] if spec.choices else str(spec.flag.low or 1) if spec.type in (int, float) else "x"
    result = run("serve", flag_name(name), value)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if result.exit_code == 0:  # else it asks for another option, in a sentence
        assert str(getattr(served[0], name)) in (value, f"{value}.0")
    else:
        assert "Error" in result.output or "error" in result.output


def test_options_reach_the_server(served: list[ServerArgs]) -> None:
    result = run("serve", "--model-path", "x.gguf", "--page-size", "32", "--disable-radix-cache", "--dtype", "float32")
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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version() -> None:
    assert run("version").stdout.startswith("headwater 0.")


HEAVY = set(
    "torch transformers tokenizers numpy zmq gguf safetensors fastapi starlette uvicorn pydantic jinja2 httpx asyncio "
    "prometheus_client typer rich importlib.metadata".split()
)
COMMAND_LINES = [
    ["--help"],
    ["--nonsense"],
    ["nonsense"],
    *([name, option] for name in COMMANDS for option in ("--help", "--nonsense")),
    ["serve", "--page-size", "0"],
    ["models", "list"],
    ["weights", "version", "--url", "http://127.0.0.1:9"],
    ["pause", "--url", "http://127.0.0.1:9"],
    ["flush", "--url", "http://127.0.0.1:9"],
    ["chat", "hello", "--url", "http://127.0.0.1:9"],
]
# each command line in a process of its own, which has imported what all of them do, as `headwater` does
PRINTS_WHAT_IT_IMPORTED = """
import json, os, sys
from headwater.cli.main import COMMANDS, app
for number, arguments in enumerate(json.loads(sys.argv[1])):
    if os.fork():
        os.wait()
        continue
    output = os.open(str(number), os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        app(arguments)
    finally:
        print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command line prints, and then the modules that it has imported."""
    folder = tmp_path_factory.mktemp("outputs")
    command = [sys.executable, "-c", PRINTS_WHAT_IT_IMPORTED, json.dumps(COMMAND_LINES)]
    subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, check=True, timeout=120)
    return {" ".join(each): (folder / str(number)).read_text() for number, each in enumerate(COMMAND_LINES)}


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=" ".join)
def test_no_command_line_pays_for_what_it_does_not_use(outputs: dict[str, str], arguments: list[str]) -> None:
    """A wrong flag was answered after 0.6 s, nearly all of it imports. Modules are counted: times are the machine's."""
    output = outputs[" ".join(arguments)]
    assert "Traceback" not in output
    imported = set(json.loads(output.splitlines()[-1]))
    assert "headwater.cli.main" in imported
    assert sorted(imported & HEAVY) == []
    ours = {name for name in imported if name.startswith("headwater.")}
    assert len(ours) < 25, ours
    assert len(imported) < 400, "the standard library's, and click's 30"


def test_the_import_of_the_package_is_light() -> None:
    code = f"import headwater, sys; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_they_say(name: str) -> None:
    """The list imports no command, so it repeats what each says of itself."""
    entry = COMMANDS[name]
    assert entry.load().name == name
    assert (entry.load().help or "").strip().splitlines()[0] == entry.summary
    assert entry.summary in run("--help").output


def test_the_python_api_has_no_other_names() -> None:
    import headwater

    assert {"Engine", "ServerArgs"} <= set(dir(headwater))
    with pytest.raises(AttributeError, match="Motor"):
        _ = headwater.Motor


def test_the_api_process_imports_no_torch() -> None:
    """It would cost every server a second of start-up and 300 MB; the engine process alone computes."""
    code = "import headwater.server.api_process, sys\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
