"""The banner of `headwater serve`, and its messages during the start."""

import logging
import os
import shlex
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from headwater.generation.model_facts import ModelFacts
from headwater.messages.state import EngineReady
from headwater.server.address import DEFAULT_URL, own_url
from headwater.version import version

SIGN_EVERY_S = 5.0
_imported_s = time.monotonic()

log = logging.getLogger(__name__)


class SignsOfLife:
    """Logs every few seconds that the server is still starting, from a thread that long imports do not block.

    Use as a context manager; call `stop` when the server is ready.
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
        """Log nothing more. Repeated calls do nothing."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            log.info("still starting after %.0f s; requests get 503 until the server is ready", process_age_s())


def print_banner(
    model: ModelFacts,
    ready: EngineReady,
    *,
    listener: socket.socket,
    num_engines: int = 1,
    needs_key: bool = False,
) -> None:
    """Print the server's address and model, the time of the start, and a command to chat with it."""
    url = own_url(listener)
    tokens = ready.num_pages * ready.page_size
    mib = ready.num_pages * ready.page_bytes / (1 << 20)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]Headwater {version()}[/] serves [bold]{escape(model.served_name)}[/] "
        f"({ready.architecture}, {ready.dtype} on {ready.device}), ready in {process_age_s():.1f} s"
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
    """The command to chat with the server at `url`, from another terminal in the same folder."""
    command = f"{program(sys.argv[0])} chat"
    if url != DEFAULT_URL:
        command += f" --url {shlex.quote(url)}"
    return command + (" --api-key KEY" if needs_key else "")


def program(started_as: str) -> str:
    """The command that starts this program: its name if the shell finds it, else the present spelling."""
    found = shutil.which("headwater")
    if os.path.basename(started_as) != "headwater":  # python -m headwater, or from a test
        return f"{shlex.quote(sys.executable)} -m headwater"
    if found is not None and os.path.realpath(found) == os.path.realpath(started_as):
        return "headwater"
    return shlex.quote(started_as)


def process_age_s() -> float:
    """Seconds since the start of this process, or since the import of this module if the system does not report it."""
    try:
        # field 22: ticks from boot to start; counted from the end of the name, which may contain spaces
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _imported_s
