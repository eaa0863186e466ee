"""`headwater flush` against a scripted server: exit codes that scripts can trust, refusals as sentences."""

import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from scripted_http import HttpScript, scripted_http

from headwater.cli.flush_view import flush_view
from headwater.cli.main import app


@pytest.fixture
def script() -> Iterator[HttpScript]:
    with scripted_http() as script:
        script.answer("/flush_cache", "Cache flushed. Freed on device: 3 pages, 1.0 MiB. Waited 0.0 s.\n")
        yield script


def run(*arguments: str, **env: str) -> Any:
    return CliRunner().invoke(app, ["flush", *arguments], env={"COLUMNS": "200", **env})


def test_without_options_it_asks_as_sglang_would(script: HttpScript) -> None:
    result = run("--url", script.url)
    assert result.exit_code == 0
    assert result.stdout == "Cache flushed. Freed on device: 3 pages, 1.0 MiB. Waited 0.0 s.\n"
    (request,) = script.to("/flush_cache")
    assert request.body == {"mode": "idle", "hold": False, "dry_run": False}
    assert request.key is None


def test_every_option_reaches_the_server(script: HttpScript) -> None:
    options = "--timeout 2.5 --mode drain --tiers device,host --cache-salt s --extra-key e --prefix p --hold --dry-run"
    assert run(*options.split(), "--url", script.url + "/", "--admin-key", "k").exit_code == 0
    (request,) = script.to("/flush_cache")
    assert request.body == {
        "timeout": 2.5,
        "mode": "drain",
        "tiers": "device,host",
        "cache_salt": "s",
        "extra_key": "e",
        "prefix": "p",
        "hold": True,
        "dry_run": True,
    }
    assert request.key == "Bearer k"


def test_an_empty_salt_is_a_scope_and_not_nothing(script: HttpScript) -> None:
    """`--cache-salt ''` is the namespace without a salt; left out it would flush all tenants."""
    run("--cache-salt", "", "--url", script.url)
    assert script.to("/flush_cache")[0].body["cache_salt"] == ""


def test_json_is_passed_on_as_it_came(script: HttpScript) -> None:
    script.answer("/flush_cache", {"success": True, "error_rate": 0})
    result = run("--json", "--url", script.url)
    assert script.to("/flush_cache")[0].accept == "application/json"
    assert (result.exit_code, result.stdout) == (0, '{"success": true, "error_rate": 0}\n')


@pytest.mark.parametrize(
    ("status", "content", "exit_code", "words"),
    [
        (200, "Cache flushed.", 0, "Cache flushed."),
        (202, "Cache flushed. Still held by running requests on device: 2 pages.", 0, "Still held"),
        (400, "Timed out waiting for idle state. Not idle: running=3.", 1, "running=3"),
        (400, {"error": {"message": "timeout: must be ...", "param": "timeout"}}, 2, "timeout: must be"),
        (401, {"error": {"message": "this route needs the admin API key"}}, 1, "HEADWATER_ADMIN_API_KEY"),
        (403, {"error": {"message": "this route needs the admin API key"}}, 1, "--admin-key"),
        (503, {"error": {"message": "engine 0 is gone: killed"}}, 1, "engine 0 is gone"),
        (500, "oops", 1, "oops"),
    ],
)
def test_exit_codes(script: HttpScript, status: int, content: Any, exit_code: int, words: str) -> None:
    script.answer("/flush_cache", content, status=status)
    result = run("--url", script.url)
    assert result.exit_code == exit_code, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_drain_past_its_deadline_fails_and_says_what_is_left(script: HttpScript) -> None:
    """Scripts wait for a drain to have the memory: exit code 0 would let them go on without it."""
    said = "Cache flushed. Pages have not all come back. Held by: 2 requests that still hold old pages.\n"
    script.answer("/flush_cache", said, status=202)
    result = run("--mode", "drain", "--timeout", "1", "--url", script.url)
    assert result.exit_code == 1
    assert result.stdout == said
    assert "longer --timeout" in result.stderr
    assert run("--url", script.url).exit_code == 0, "another mode does not wait for what is held"


@pytest.mark.parametrize(
    ("options", "words"),
    [((), ("--timeout 30", "--mode now")), (("--timeout", "1"), ("--hold", "longer --timeout", "--mode now"))],
)
def test_a_busy_flush_says_what_to_do_next(
    script: HttpScript, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    script.answer("/flush_cache", "Flush cache failed. Not idle: 3 running requests.", status=400)
    result = run(*options, "--url", script.url)
    assert result.exit_code == 1
    assert "Nothing was flushed" in result.stderr
    assert all(word in result.stderr for word in words)


def test_no_server_is_a_sentence_and_exit_code_1() -> None:
    result = run("--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "No server answers at http://127.0.0.1:9" in result.output


@pytest.mark.parametrize("url", ["nonsense", "http://[bad", "ftp://x"])
def test_a_malformed_url_is_a_sentence(url: str) -> None:
    result = run("--url", url)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit), result.exception
    assert url in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("options", [["--mode", "later"], ["--timeout", "-1"], ["--timeout", "abc"], ["--nonsense"]])
def test_wrong_usage_is_exit_code_2_and_asks_nobody(script: HttpScript, options: list[str]) -> None:
    assert run(*options, "--url", script.url).exit_code == 2
    assert script.received == []


def test_while_it_waits_a_terminal_shows_what_blocks_and_the_time_left(script: HttpScript) -> None:
    """In a pseudo-terminal, as a person sees it."""
    script.answer("/flush_cache", "Cache flushed.")
    script.held["/flush_cache"] = has_waited = threading.Event()
    engines = [{"dp_rank": 0, "success": True, "blockers": {"running": 3}}]
    script.answer("/control/blockers", {"blockers": {"running": 3}, "engines": engines})
    arguments = ("flush", "--timeout", "10", "--url", script.url, "--admin-key", "k")
    shown = in_terminal(*arguments, until=("3 running", "s left"), reached=has_waited)
    assert "3 running" in shown
    assert "s left" in shown
    assert shown.rstrip().endswith("Cache flushed.")
    assert script.to("/control/blockers")[0].key == "Bearer k"


def test_ctrl_c_leaves_the_server_which_cancels_the_flush(script: HttpScript) -> None:
    script.answer("/flush_cache", "Cache flushed.", delay_s=30.0)  # its client does not wait for it
    command = [sys.executable, "-m", "headwater", "flush", "--timeout", "60", "--url", script.url]
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, preexec_fn=reset, **pipes) as process:
        while not script.received:
            time.sleep(0.01)
        process.send_signal(2)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Cancelled" in err
    assert "Traceback" not in out + err


def in_terminal(*arguments: str, until: tuple[str, ...], reached: threading.Event) -> str:
    """What the command shows. `reached` is set when it has shown all of `until`."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "headwater", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
            if all(words.encode() in shown for words in until):
                reached.set()
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return shown.decode()


def rendered(answer: Any, **times: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(flush_view(answer, **times))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_view_names_each_engine_when_there_are_several() -> None:
    engines = [
        {"dp_rank": 0, "success": True, "blockers": {"running": 2, "queued": 1}},
        {"dp_rank": 1, "success": True, "blockers": {}},
        {"dp_rank": 2, "success": False, "message": "engine 2 is gone: killed"},
    ]
    text = rendered({"engines": engines}, mode="idle", waited_s=2.0, timeout_s=10.0)
    assert "8.0 s left" in text
    assert "engine 0: 1 queued request, 2 running requests" in text
    assert "engine 1: idle" in text
    assert "engine 2: engine 2 is gone" in text


def test_the_view_does_without_blockers_and_never_counts_below_zero() -> None:
    text = rendered(None, mode="drain", waited_s=11.0, timeout_s=10.0)
    assert "pages to come back" in text
    assert "0.0 s left" in text
