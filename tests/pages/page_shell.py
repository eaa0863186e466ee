"""Runs commands of the pages in bash as a reader would, with a test's server, model and folders in place of theirs."""

import json
import os
import pty
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from page_commands import ROOT
from tiered import write_byte_tokenizer

from tiny_models import make_adapter, make_tiny_model

LIMIT_S = 120.0
CONTEXT = 640  # of the model: long enough for the prompts of the pages, a token for each byte
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
IN_THE_CLONE = re.compile(r"\b(?:deploy|integrations|benchmarks)/")
CHECKPOINTS = ("step-2", "step-3")


@dataclass(frozen=True, slots=True)
class PageShell:
    """A folder with programs of the names that the pages use: this source's `headwater`, and a curl that fails on 4xx.

    Commands run in `folder`, or in the clone if they name a file of it.
    """

    folder: Path
    model: Path

    @classmethod
    def make(cls, folder: Path) -> "PageShell":
        """With a tiny model, two later checkpoints of it, two LoRA adapters and a file of tensors."""
        programs = {
            "headwater": f'exec {shlex.quote(sys.executable)} -m headwater "$@"',
            "python": f'exec {shlex.quote(sys.executable)} "$@"',
            "curl": f"""case " $* " in *" -f "*) fail= ;; *) fail=--fail-with-body ;; esac
                exec {shutil.which("curl")} $fail --silent --show-error --noproxy '*' "$@\"""",
            "xdg-open": f"exec {shutil.which('curl')} --fail --silent --noproxy '*' \"$1\"",
        }
        for name, line in programs.items():
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/sh\n{line}\n")
            program.chmod(0o755)
        base = _write_model(folder / "model", seed=0)
        for number, name in enumerate(CHECKPOINTS, start=1):
            _write_model(folder / name, seed=number)
        for number, name in enumerate(("sql-adapter", "law-adapter")):
            make_adapter(base, folder / name, rank=4, seed=number)
        shutil.copy(folder / CHECKPOINTS[1] / "model.safetensors", folder / "part-1")
        return cls(folder, folder / "model")

    def run(self, command: str, *, url: str, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Run one command of a page against the server at `url`; its output, both streams."""
        return subprocess.run(
            ["bash", "-c", self.replaced(command, url=url)],
            cwd=ROOT if IN_THE_CLONE.search(command) else self.folder,
            env=self.environment(url),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def environment(self, url: str) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "HEADWATER_URL": url, "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm-256color"}
        return os.environ | own

    def replaced(self, command: str, *, url: str) -> str:
        """The command with this server's address, and folders and files of the test."""
        address = url.removeprefix("http://")
        for pattern, text in (
            (r"(?:127\.0\.0\.1|localhost):3000[01]", address),
            (r'make serve ARGS="([^"]*)"', r"headwater serve \1"),
            (r"(?:\.venv/bin/)?headwater serve|make serve", f"headwater serve --port {address.rpartition(':')[2]}"),
            (r" --port 8000", ""),
            (r"\.venv/bin/", ""),
            (r"--model (?:FOLDER|MODEL|Qwen/\S+)", f"--model {self.model}"),
            (r"/checkpoints/", f"{self.folder}/"),
            (r"/var/lib/headwater|/tmp/pages", f"{self.folder}/pages"),
            (r"\bTOKENIZER\b", f"{self.folder}/tokenizer"),
            (r"tcp://127\.0\.0\.1:5557", f"tcp://127.0.0.1:{free_port()}"),
        ):
            command = re.sub(pattern, text, command)
        return command

    def run_in_terminal(self, command: str, *, url: str, until: str, keys: str) -> int:
        """Run a command in a terminal of 100 x 30 and press `keys` once it has shown `until`. Its exit code."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.folder)
            os.execvpe("bash", ["bash", "-c", f"stty rows 30 cols 100; {self.replaced(command, url=url)}"],
                       self.environment(url))  # fmt: skip
        shown, deadline, has_pressed = b"", time.monotonic() + LIMIT_S, False
        try:
            while time.monotonic() < deadline:
                if select.select([terminal], [], [], 0.1)[0]:
                    try:
                        shown += os.read(terminal, 65536)
                    except OSError:  # it has ended
                        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if until.encode() in shown and not has_pressed:
                    os.write(terminal, keys.encode())
                    has_pressed = True
            raise AssertionError(f"{command} has not ended; it has shown\n{shown.decode(errors='replace')}")
        finally:
            os.close(terminal)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _write_model(folder: Path, *, seed: int):
    """Of one shape whatever the seed, and random: it answers until its context is full."""
    folder.mkdir()
    model = make_tiny_model("llama", folder, seed=seed)
    write_byte_tokenizer(folder, is_ascii=True)
    for name, fields in (
        ("config.json", {"max_position_embeddings": CONTEXT}),
        ("tokenizer_config.json", {"chat_template": CHAT_TEMPLATE, "model_max_length": CONTEXT}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return model
