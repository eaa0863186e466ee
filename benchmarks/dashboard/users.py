"""Who uses the server in cost.py: streams, open pages, and a Prometheus that asks often. Also tokens for its tree."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

NUM_PREFIXES = 300  # in the tree
OPEN_S = 1.5  # the first, whole snapshots of pages are no running cost
NUM_STREAMS = 4
NUM_TOKENS = 64  # of each answer under load


class Load:
    """Streams in a closed loop, for as long as the context lasts."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(index,)) for index in range(NUM_STREAMS)]

    def _stream(self, index: int) -> None:
        sampling = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
        turn = 0
        while not self._is_over.is_set():
            turn += 1
            body = {
                "input_ids": ids_of(index, turn, num_tokens=24),
                "sampling_params": sampling,
                "no_store": True,
                "stream": True,
            }
            with httpx.stream("POST", f"{self._url}/generate", json=body, timeout=60, trust_env=False) as answer:
                for _ in answer.iter_raw():
                    pass

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def ids_of(*numbers: int, num_tokens: int) -> list[int]:
    """Token ids that any vocabulary has, others for other numbers."""
    seed = sum((number + 1) * factor for number, factor in zip(numbers, (7919, 104_729), strict=False))
    return [3 + (seed * (place + 1) + place * place) % 180 for place in range(num_tokens)]


@contextlib.contextmanager
def pages(url: str, count: int, folder: Path) -> Iterator[list[tuple[int, Path]]]:
    """`count` open pages: the process of each, and the file that grows with what it gets."""
    files = [folder / f"page-{index}" for index in range(count)]
    command = ["curl", "-sN", "--noproxy", "*", f"{url}/dashboard/events", "-o"]
    processes = [subprocess.Popen([*command, str(file)]) for file in files]
    try:
        time.sleep(OPEN_S)
        yield [(process.pid, file) for process, file in zip(processes, files, strict=True)]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(10)


@contextlib.contextmanager
def scrapes(url: str, *, per_s: float, codes: Path) -> Iterator[None]:
    """GET `/metrics` so many times a second, by a process that parses nothing. Each answer's status goes to `codes`."""
    command = ["curl", "-sN", "--noproxy", "*", "--rate", f"{round(per_s * 60)}/m", "-o", "/dev/null"]
    command += ["-w", "%{stderr}%{http_code}\n"]  # stderr is not buffered
    with codes.open("w") as file:
        # what is behind `#` is curl's alone: it repeats the request on one connection
        process = subprocess.Popen([*command, f"{url}/metrics#[1-1000000]"], stderr=file)
        try:
            yield
        finally:
            process.terminate()
            process.wait(10)


def num_answers(codes: Path) -> int:
    """Raises RuntimeError if one was not 200."""
    found = codes.read_text().split()
    if set(found) - {"200"}:
        raise RuntimeError(f"/metrics was answered with {set(found)}")
    return len(found)


def fill(url: str) -> None:
    """Prompts with common beginnings, of several tenants."""

    def one(index: int) -> None:
        ids = [*ids_of(index % 12, num_tokens=64), *ids_of(index, index % 7, num_tokens=32)]
        body = {"input_ids": ids, "cache_salt": f"t{index % 5}", "sampling_params": {"max_new_tokens": 1}}
        httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False).raise_for_status()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(NUM_PREFIXES)))
