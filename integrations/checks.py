"""The checks of one client, run inside its environment: `@check(name)` declares one, `run_checks` runs them all.

Only the standard library is used here, since every client has an environment of its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

REPORT_VARIABLE = "HEADWATER_REPORT"  # the file that gets a line of JSON for each check
PAGES = Path(__file__).parents[1] / "docs" / "clients"
PAGE_URL, PAGE_MODEL = "http://127.0.0.1:30000", "smollm2-135m-instruct"  # as the pages show them
URL_VARIABLES = {
    "model": "HEADWATER_URL",
    "second": "HEADWATER_SECOND_URL",
    "scripted": "HEADWATER_SCRIPTED_URL",
}


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, as a check sees it."""

    url: str  # without a slash at the end
    model: str  # the served model's name

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


class Skipped(Exception):
    """A check that cannot be made here; the message is the reason."""


class CheckTimeout(BaseException):
    """Not an Exception, since clients catch those and try again."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    function: Callable[[Server], Any]
    on: str
    limit_s: float


_checks: list[Check] = []


def check(name: str, *, on: str = "model", limit_s: float = 90.0) -> Callable[[Callable[[Server], Any]], Any]:
    """Declare a check. It passes if it returns; an exception is its failure. `on` is a server of servers.py."""

    def declare(function: Callable[[Server], Any]) -> Callable[[Server], Any]:
        _checks.append(Check(name, function, on, limit_s))
        return function

    return declare


def skip(reason: str) -> NoReturn:
    raise Skipped(reason)


def page_blocks(page: str, language: str, server: Server) -> list[str]:
    """The blocks of code on docs/clients/PAGE.md, with this server's URL and model in place of those shown."""
    text = (PAGES / f"{page}.md").read_text()
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block.replace(PAGE_URL, server.url).replace(PAGE_MODEL, server.model) for block in blocks]


def check_page(page: str) -> None:
    """Declare the check that a page's Python code runs as it stands."""

    @check("page")
    def run_page(server: Server) -> None:
        (code,) = page_blocks(page, "python", server)
        ran = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, timeout=80)
        assert ran.returncode == 0, ran.stderr.strip().splitlines()[-1]
        assert ran.stdout.strip()


def refused(kind: type[BaseException], function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """The error of this kind that a call raises. AssertionError if it raises none."""
    try:
        function(*args, **more)
    except kind as error:
        return error
    raise AssertionError(f"{more or args} was accepted")


def server_at(url: str) -> Server:
    models = call(url, "/v1/models")
    return Server(url=url, model=models["data"][0]["id"])


def call(url: str, path: str, body: Any = None, *, method: str | None = None, timeout_s: float = 60.0) -> Any:
    """JSON of a route, without any client. Raises HTTPError for an error status."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        text = answer.read()
    return json.loads(text) if text.startswith((b"{", b"[")) else text.decode()


def run_checks() -> None:
    """Run the checks that were declared, or those named on the command line; report each as it ends."""
    servers = {name: server_at(os.environ[key]) for name, key in URL_VARIABLES.items() if key in os.environ}
    wanted = [one for one in _checks if not sys.argv[1:] or one.name in sys.argv[1:]]
    with open(os.environ.get(REPORT_VARIABLE, os.devnull), "a") as report:
        for one in wanted:
            outcome = _run(one, servers)
            print(json.dumps(outcome), file=report, flush=True)
            print(f"  {outcome['result']:7} {one.name} {outcome['reason']}".rstrip(), flush=True)


def _run(one: Check, servers: dict[str, Server]) -> dict[str, Any]:
    began_s = time.monotonic()
    result, reason = "passed", ""

    def stop(*_: object) -> NoReturn:
        raise CheckTimeout

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, one.limit_s, 5.0)  # again, where a client swallows the first
    try:
        if one.on not in servers:
            skip(f"no server {one.on!r} is given")
        one.function(servers[one.on])
    except Skipped as skipped:
        result, reason = "skipped", str(skipped)
    except CheckTimeout:
        result, reason = "failed", f"not done in {one.limit_s:.0f} s"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a client may raise anything
        traceback.print_exc()
        result, reason = "failed", _reason(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    took_s = round(time.monotonic() - began_s, 2)
    return {"check": one.name, "on": one.on, "result": result, "reason": reason, "seconds": took_s}


def _reason(error: BaseException) -> str:
    """One line; an assertion without words is shown as its code."""
    text = " ".join(str(error).split())
    if not text and error.__traceback__ is not None:
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{type(error).__name__}: {text}"[:400]
