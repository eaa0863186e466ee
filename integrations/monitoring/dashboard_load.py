"""A load under which every panel of the dashboard shows something: it evicts, restores, flushes and is refused."""

import random
import threading
from typing import Any

import httpx

SMALL = ("--max-total-tokens", "1024", "--max-running-requests", "4", "--max-queued-requests", "2")
TIERS = (
    "--enable-hierarchical-cache", "--hicache-ratio", "2", "--hicache-write-policy", "write_through",
    "--hicache-restore-policy", "always", "--hicache-storage-backend", "file",
)  # fmt: skip
PREFIX_TOKENS = 160  # 10 pages: the device has room for 6 prefixes, the host for 12
NUM_HOT, NUM_COLD = 8, 60  # prefixes; the hot ones are half of the requests
NUM_STREAMS = 7  # one more than run and wait: a request is refused at times
NOBODY = "&cache_salt=nobody"  # a flush that waits, ends and cuts nothing, so that pages grow old and are evicted


class DashboardLoad:
    """Streams of requests and flushes against a server that was started with `SMALL` and `TIERS`; a context manager."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30, trust_env=False)
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(index,)) for index in range(NUM_STREAMS)]
        self._threads += [threading.Thread(target=work) for work in (self._flush, self._wait_for_idle)]

    def _stream(self, index: int) -> None:
        source = random.Random(index)
        while not self._is_over.is_set():
            is_hot = source.random() < 0.5
            prefix = source.randrange(NUM_HOT) if is_hot else NUM_HOT + source.randrange(NUM_COLD)
            ids = [3 + (prefix * 41 + place * 31 + place // 90 * prefix) % 180 for place in range(PREFIX_TOKENS)]
            body = {
                "input_ids": [*ids, 3 + source.randrange(90), 3 + source.randrange(90)],
                "sampling_params": {"max_new_tokens": 12, "ignore_eos": True},
            }
            self._post("/generate", body)
            self._is_over.wait(0.05)

    def _flush(self) -> None:
        """In every mode and with every outcome; the whole cache only now and then."""
        turn = 0
        while not self._is_over.wait(0.7):
            mode, timeout = (("idle", 0), ("now", 0), ("drain", 0), ("drain", 5), ("idle", 0.3))[turn % 5]
            self._post(f"/flush_cache?mode={mode}&timeout={timeout}{NOBODY if turn % 15 else ''}")
            turn += 1

    def _wait_for_idle(self) -> None:
        """A flush that is pending most of the time, since the engine is never idle for long."""
        while not self._is_over.is_set():
            self._post(f"/flush_cache?mode=idle&timeout=3{NOBODY}")

    def _post(self, path: str, body: Any = None) -> None:
        try:
            self._http.post(path, json=body)
        except httpx.TransportError:
            self._is_over.wait(0.5)

    def __enter__(self) -> "DashboardLoad":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self._http.close()
