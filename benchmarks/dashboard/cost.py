"""The cost of the operating page: processor time of an idle server with open pages, and throughput beside one.

Figures are differences and ratios of alternating measurements in one run. Processor time is that of the server's
processes, so the load of others on the machine disturbs it less than wall time; `foreign_cores` reports that load.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from headwater.bench.machine import process_tree
from results import save
from server_process import ServerProcess

COMMAND = "-m headwater serve --port {port} --enable-hierarchical-cache --max-total-tokens 60000"
NUM_PREFIXES = 300  # in the tree
SETTLE_S = 10.0  # the server prepares grammars, and copies pages to the host
NUM_STREAMS = 4
NUM_TOKENS = 64  # of each answer under load
TARGETS = {"share_of_a_core_20_pages": 0.02, "tokens_per_s_with_1_page": 0.99}


def cpu_s(pid: int) -> float:
    """Processor time of a process and those that it started."""
    total = 0.0
    for each in process_tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


@contextlib.contextmanager
def pages(url: str, count: int) -> Iterator[list[int]]:
    """`count` readers of the stream, as tabs are; counts the bytes that each got."""
    ended, sizes = threading.Event(), [0] * count

    def read(index: int) -> None:
        with httpx.stream("GET", f"{url}/dashboard/events", timeout=30, trust_env=False) as stream:
            for chunk in stream.iter_raw():
                sizes[index] += len(chunk)
                if ended.is_set():
                    return

    threads = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(2)  # their first, whole snapshots are no running cost
    try:
        yield sizes
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=5)
        time.sleep(1)


def fill(url: str) -> None:
    def one(index: int) -> None:
        ids = [(7919 * (index % 12) + 13 * k) % 40_000 for k in range(64)] + [
            (104_729 * index + 31 * k) % 40_000 for k in range(32)
        ]
        body = {"input_ids": ids, "cache_salt": f"t{index % 5}", "sampling_params": {"max_new_tokens": 1}}
        httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False).raise_for_status()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(NUM_PREFIXES)))


def idle(server: ServerProcess, count: int, seconds: float) -> dict[str, float]:
    with pages(server.target.url, count) as sizes:
        before_s, before_bytes, began_s = cpu_s(server.pid), sum(sizes), time.perf_counter()
        time.sleep(seconds)
        wall_s = time.perf_counter() - began_s
        share = (cpu_s(server.pid) - before_s) / wall_s
        per_page = (sum(sizes) - before_bytes) / wall_s / count if count else 0.0
    return {"workload": "idle", "num_pages": count, "share_of_a_core": share, "bytes_per_s_of_a_page": per_page}


def loaded(server: ServerProcess, count: int, seconds: float) -> dict[str, float]:
    """Streams in a closed loop. Tokens a second, and a second of processor time."""
    url, num_tokens, end_s = server.target.url, [0] * NUM_STREAMS, 0.0

    def stream(index: int) -> None:
        turn = 0
        while time.perf_counter() < end_s:
            turn += 1
            ids = [(911 * index + 37 * turn + 13 * k) % 40_000 for k in range(24)]
            sampling = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
            body = {"input_ids": ids, "sampling_params": sampling, "no_store": True, "stream": True}
            with httpx.stream("POST", f"{url}/generate", json=body, timeout=60, trust_env=False) as answer:
                for _ in answer.iter_raw():
                    pass
            num_tokens[index] += NUM_TOKENS

    with pages(url, count) if count else contextlib.nullcontext():
        before_s, began_s = cpu_s(server.pid), time.perf_counter()
        end_s = began_s + seconds
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            list(pool.map(stream, range(NUM_STREAMS)))
        wall_s, used_s = time.perf_counter() - began_s, cpu_s(server.pid) - before_s
    tokens = sum(num_tokens)
    return {
        "workload": "loaded", "num_pages": count, "tokens_per_s": tokens / wall_s, "tokens_per_cpu_s": tokens / used_s,
    }  # fmt: skip


def measure(server: ServerProcess, *, seconds: float, repeats: int) -> list[dict[str, float]]:
    records = []
    time.sleep(SETTLE_S)
    counts = (0, 1, 20)
    for kind in (idle, loaded):
        for repeat in range(repeats):
            for count in counts if repeat % 2 == 0 else reversed(counts):
                record: dict[str, float] = {}
                with server.foreign_work(record):
                    record |= kind(server, count, seconds)
                print({name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()})
                records.append(record)
    return records


def figures(records: list[dict[str, float]]) -> dict[str, float]:
    def median(workload: str, count: int, name: str) -> float:
        found = [r[name] for r in records if (r["workload"], r["num_pages"]) == (workload, count)]
        return statistics.median(found)

    def ratio(count: int, name: str) -> float:
        return median("loaded", count, name) / median("loaded", 0, name)

    alone = median("idle", 0, "share_of_a_core")
    return {
        "share_of_a_core_1_page": median("idle", 1, "share_of_a_core") - alone,
        "share_of_a_core_20_pages": median("idle", 20, "share_of_a_core") - alone,
        "tokens_per_s_with_1_page": ratio(1, "tokens_per_s"),
        "tokens_per_cpu_s_with_1_page": ratio(1, "tokens_per_cpu_s"),
        "tokens_per_cpu_s_with_20_pages": ratio(20, "tokens_per_cpu_s"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write a record to benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = f"{sys.executable} {COMMAND}"
        server = ServerProcess(command, environment={}, model="default", extra={}, log=Path(folder) / "log")
        try:
            server.wait_until_answering(120)
            fill(server.target.url)
            records = measure(server, seconds=args.seconds, repeats=args.repeats)
        finally:
            server.stop()
    found = figures(records)
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    print(f"targets: {TARGETS}")
    if args.save:
        named = [record | {"server": "headwater"} for record in records]
        print(save("dashboard-cost", [*named, found], servers={"headwater": {"command": ["python", *server.argv[1:]]}}))


if __name__ == "__main__":
    main()
