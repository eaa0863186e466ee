#!/usr/bin/env python3
"""The time of a token outside the kernels, through HTTP with server-sent events, on the CPU.

    control_path.py [--streams 1 16] [--rounds 5] [--threads 2] [--against NAME=SRC]

A real server (two processes) serves the default model. Its engine notes when it calls the kernels and how long its
thread computed until then. The kernel counts the other threads' time. With `--against`, servers of another source tree
(a checkout's `src` folder) take turns with those of this tree.

Microseconds, for each step (`_step`) or each token (`_token`):

    engine_cpu_us_step    CPU of the engine's thread between two calls of the kernels
    engine_io_us_step     CPU of the engine's ZeroMQ threads
    engine_gap_us_step    wall time between two calls of the kernels, median: the cores compute nothing meanwhile
    api_cpu_us_token      CPU of the whole API process
    delivery_us           from the end of the kernels to the event at the client, median
    control_us_token      the first, second and fourth together: all that the server computes outside the kernels

CPU times count on a busy machine; wall times need a quiet one.
"""

import argparse
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from control_path_parts.streams import Window, run_streams

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "serving"))
from results import save  # noqa: E402

FIGURES = (
    "kernels_us_step", "engine_cpu_us_step", "engine_io_us_step", "engine_gap_us_step", "api_cpu_us_token",
    "delivery_us", "control_us_token",
)  # fmt: skip


class Server:
    """A running server whose engine is timed."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.port = port
        self._api = process.pid
        self._engine = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])

    def cpu_ns(self) -> dict[str, int]:
        """CPU of the API process, and of the engine's ZeroMQ threads."""
        api = sum(_threads_cpu_ns(self._api).values())
        engine_io = sum(ns for name, ns in _threads_cpu_ns(self._engine).items() if name[0].startswith("ZMQ"))
        return {"api": api, "engine_io": engine_io}


def _threads_cpu_ns(pid: int) -> dict[tuple[str, str], int]:
    """Nanoseconds on a CPU by name and id of the thread."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {
        ((it / "comm").read_text().strip(), it.name): int((it / "schedstat").read_text().split()[0]) for it in tasks
    }


@contextmanager
def serve(source: Path, out: Path, flags: list[str], *, pause_ms: float) -> Iterator[Server]:
    """Yield a server of the package in `source` that answers; its engine's calls are in `out` afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE / "control_path_parts" / "timed_server.py"), str(out), "serve"]
    environment = os.environ | {"PYTHONPATH": str(source), "CONTROL_PATH_PAUSE_MS": str(pause_ms)}
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *flags],
        env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_until_ready(process, port)
        yield Server(process, port)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_ready(process: subprocess.Popen, port: int) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError("the server did not become ready")


def figures(window: Window, calls: np.ndarray, *, num_streams: int) -> dict[str, float]:
    """The figures above, of the steps within the window that every stream had a token of."""
    within = calls[(calls[:, 1] > window.began_ns) & (calls[:, 2] < window.ended_ns)]
    steps = np.flatnonzero(within[:, 0] == num_streams)
    assert len(steps) > 10, "the window has too few steps"
    gaps, cpu = [], []
    for first, second in itertools.pairwise(steps):  # ops of sampling lie between them
        gaps.append(int((within[first + 1 : second + 1, 1] - within[first:second, 2]).sum()))
        cpu.append(int((within[first + 1 : second + 1, 3] - within[first:second, 4]).sum()))
    ended_ns = calls[calls[:, 0] > 0, 2].tolist()
    waited = [at - ended_ns[bisect_right(ended_ns, at) - 1] for at in window.came_ns]
    num_tokens = len(steps) * num_streams
    cpu_ns = {name: window.after[name] - window.before[name] for name in window.before}
    found = {
        "kernels_us_step": float(np.median(within[steps, 2] - within[steps, 1])) / 1e3,
        "engine_cpu_us_step": statistics.mean(cpu) / 1e3,
        "engine_io_us_step": cpu_ns["engine_io"] / len(steps) / 1e3,
        "engine_gap_us_step": statistics.median(gaps) / 1e3,
        "engine_gap_us_quartiles": [round(it / 1e3, 1) for it in statistics.quantiles(gaps, n=4)],
        "api_cpu_us_token": cpu_ns["api"] / num_tokens / 1e3,
        "delivery_us": statistics.median(waited) / 1e3,
        "num_steps": len(steps),
    }
    per_step = found["engine_cpu_us_step"] + found["engine_io_us_step"]
    found["control_us_token"] = per_step / num_streams + found["api_cpu_us_token"]
    return {name: round(it, 1) if isinstance(it, float) else it for name, it in found.items()}


def measure(source: Path, options: argparse.Namespace, flags: list[str]) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "calls.npy"
        windows = []
        with serve(source, out, flags, pause_ms=options.pause_ms) as server:
            for num_streams in options.streams:
                windows.append(
                    run_streams(
                        server.port,
                        num_streams=num_streams,
                        num_tokens=options.tokens,
                        temperature=options.temperature,
                        snapshot=server.cpu_ns,
                    )
                )
        calls = np.load(out)
    return [
        {"num_streams": num} | figures(window, calls, num_streams=num)
        for num, window in zip(options.streams, windows, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=400, help="generated by each stream")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--pause-ms", type=float, default=0.0, help="of each decode step, instead of its kernels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", metavar="NAME=SRC", help="another tree's `src` folder, by turns")
    parser.add_argument("--no-save", action="store_true", help="print, but write no result file")
    options = parser.parse_args()
    sources = {"this": HERE.parent / "src"}
    if options.against:
        name, _, folder = options.against.partition("=")
        sources[name] = Path(folder).resolve()
    flags = ["--log-level", "error", *(["--threads", str(options.threads)] if options.threads else [])]
    records = []
    for number in range(options.rounds):
        for name in list(sources)[:: 1 if number % 2 else -1]:
            for record in measure(sources[name], options, flags):
                given = {"server": name, "temperature": options.temperature, "pause_ms": options.pause_ms}
                records.append(given | record)
                print(" ".join(f"{key}={it}" for key, it in records[-1].items()), flush=True)
    for num_streams in options.streams:
        print(f"medians at {num_streams} streams:")
        for figure in FIGURES:
            cells = []
            for name in sources:
                found = [it[figure] for it in records if (it["server"], it["num_streams"]) == (name, num_streams)]
                cells.append(f"{name} {statistics.median(found):9.1f}")
            print(f"  {figure:20}", "  ".join(cells))
    if not options.no_save:
        print("written to", save("control-path", records, servers=dict.fromkeys(sources, flags)))


if __name__ == "__main__":
    main()
