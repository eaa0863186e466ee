"""What `headwater serve` prints when it is ready, and what it says until then."""

import logging
import os
import shlex
import shutil
import socket
import sys
import threading

from rich.console import Console
from rich.markup import escape

from headwater.generation.model_facts import ModelFacts
from headwater.messages.state import EngineReady
from headwater.server.address import DEFAULT_URL, own_url
from headwater.server.process_age import process_age_s
from headwater.version import version

SIGN_EVERY_S = 5.0

log = logging.getLogger(__name__)


class SignsOfLife:
    """Says every few seconds that the server is still starting, from a thread that long imports do not hold up.

    Use as a context manager; `stop` when the server is ready.
    """

    def __init__(self, every_s: float = SIGN_EVERY_S) -> None:
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs-of-life", daemon=True)

    def __enter__(self) -> "SignsOfLife":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Say nothing more. Harmless when repeated."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            log.info("still starting, %.0f s so far; requests are answered 503 until then", process_age_s())


def print_banner(
    model: ModelFacts,
    ready: EngineReady,
    *,
    listener: socket.socket,
    num_engines: int = 1,
    needs_key: bool = False,
) -> None:
    """Where the server is, what it serves, how long the start took, and how to talk to it."""
    url = own_url(listener)
    tokens = ready.num_pages * ready.page_size
    mib = ready.num_pages * ready.page_bytes / (1 << 20)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]Headwater {version()}[/] serves [bold]{escape(model.served_name)}[/] "
        f"({ready.architecture}, {ready.dtype} on {ready.device}), ready {process_age_s():.1f} s after its start"
    )
    console.print(f"  API      {url}/v1  (OpenAI), {url}/generate  (SGLang)")
    console.print(f"  Docs     {url}/docs")
    console.print(f"  Metrics  {url}/metrics")
    each = f" in each of {num_engines} engines" if num_engines > 1 else ""
    console.print(
        f"  KV cache {tokens:,} tokens in {ready.num_pages:,} pages of {ready.page_size}, {mib:,.0f} MiB{each}"
    )
    console.print(f"  Try      {escape(chat_command(url, needs_key=needs_key))}    (Ctrl-C here ends the server)")
    sys.stdout.flush()


def chat_command(url: str, *, needs_key: bool) -> str:
    """What to type, in another terminal in the same folder, to chat with the server at `url`."""
    command = f"{program(sys.argv[0])} chat"
    if url != DEFAULT_URL:
        command += f" --url {shlex.quote(url)}"
    return command + (" --api-key KEY" if needs_key else "")


def program(started_as: str) -> str:
    """How to start this program again: by its name where the shell finds it, else as it was started now."""
    found = shutil.which("headwater")
    if os.path.basename(started_as) != "headwater":  # python -m headwater, or from a test
        return f"{shlex.quote(sys.executable)} -m headwater"
    if found is not None and os.path.realpath(found) == os.path.realpath(started_as):
        return "headwater"
    return shlex.quote(started_as)
