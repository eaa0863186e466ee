"""Install the wheel of this platform into a fresh environment in another folder, and serve from it: `make test-wheel`.

The server finds no compiler, no clone and no cached kernels. It must answer a chat and a flush, computing with the
wheel's own kernels.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server
from typing import Any

ROOT = Path(__file__).parents[1]
MAX_INSTALLED_MB = 300
NOT_FOR_A_CPU = ("torch", "triton", "transformers", "ziglang")
START_S, ANSWER_S = 180, 120


def main() -> None:
    wheels = [path for path in (ROOT / "dist").glob("*.whl") if path.stem.endswith(f"_{platform.machine()}")]
    check(len(wheels) == 1, f"dist/ has one wheel for this platform: {wheels}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            "PATH": str(folder / "venv/bin"),  # no compiler
            "HOME": str(Path.home()),
            "XDG_CACHE_HOME": str(folder / "cache"),  # no kernels
            "HEADWATER_CACHE": _model_cache(),
            **{key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "HTTP", "http"))},
        }
        install(wheels[0], folder)
        with serving(folder, environment) as (url, log):
            serve_and_flush(url, log)
        check(not (folder / "cache/headwater/native").exists(), "nothing was compiled")
    print(f"{wheels[0].name} serves")


def install(wheel: Path, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], cwd=folder, check=True)
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    own = packages / "headwater/__init__.py"
    check(own.exists(), f"the package is in the environment, not in the clone: {own}")
    heavy = [name for name in NOT_FOR_A_CPU if (packages / name).exists()]
    check(not heavy, f"installed without need: {heavy or None}")
    num_bytes = sum(path.stat().st_blocks * 512 for path in (folder / "venv").rglob("*") if not path.is_symlink())
    check(num_bytes < MAX_INSTALLED_MB * 1e6, f"the environment takes {num_bytes / 1e6:.0f} MB")


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """A server from the wheel: its URL, and the file of its output."""
    with create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [str(folder / "venv/bin/headwater"), "serve", "--port", str(port)]
    started_s = time.monotonic()
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_healthy(url):
            is_late = time.monotonic() - started_s > START_S
            check(server.poll() is None and not is_late, f"the server starts:\n{log.read_text()}", quiet=True)
            time.sleep(0.1)
        print(f"ready after {time.monotonic() - started_s:.1f} s")
        yield url, log
    finally:
        server.terminate()
        server.wait(timeout=60)
    check(server.returncode == 0, f"the server ends with status {server.returncode}")


def serve_and_flush(url: str, log: Path) -> None:
    message = {"role": "user", "content": "What is the capital of France? Answer in one word."}
    chat = _post(f"{url}/v1/chat/completions", {"model": "default", "temperature": 0, "messages": [message]})
    text = chat["choices"][0]["message"]["content"]
    check("Paris" in text, f"the default model answers: {text!r}")
    flushed = _read(urllib.request.Request(f"{url}/flush_cache", method="POST")).decode()
    check(flushed.startswith("Cache flushed."), flushed.strip())
    compute = json.loads(_read(f"{url}/server_info"))["compute"]
    check(compute["kernels"] == "shipped", f"kernels: {compute['kernels']}, {compute['instruction_set']}")
    check(f"{compute['instruction_set']}, shipped" in log.read_text(), "the banner names the kernels")


def check(holds: bool, claim: str, *, quiet: bool = False) -> None:
    if not holds:
        sys.exit(f"FAILED: {claim}")
    if not quiet:
        print(f"ok: {claim}", flush=True)


def _model_cache() -> str:
    """Where the default model is, if it has been fetched: the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return os.environ.get("HEADWATER_CACHE") or str(Path(base) / "headwater")


def _is_healthy(url: str) -> bool:
    try:
        _read(f"{url}/health")
    except OSError:
        return False
    return True


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(_read(request))


def _read(request: str | urllib.request.Request) -> bytes:
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return answer.read()


if __name__ == "__main__":
    main()
