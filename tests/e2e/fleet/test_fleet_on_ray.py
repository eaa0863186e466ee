"""`headwater fleet` on Ray with real processes (`make test-fleet`): scaling, routing, and flushes while replicas fail.

One fleet for the whole file, whose tests run in this order: Ray takes long to start.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.append(str(Path(__file__).parents[2] / "storage"))
from redis_server import RedisServer

from headwater.storage.redis.layout import GENERATIONS, PAGE_PREFIX

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("HEADWATER_RAY_PYTHON") or ROOT / ".venv-ray" / "bin" / "python")
KEY = {"authorization": "Bearer admin"}
JSON = KEY | {"accept": "application/json"}
LIMIT_S = 120.0
NUM_TOKENS = 90  # of a stream; the model has room for 256


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Fleet:
    """`headwater fleet up` and what it serves."""

    def __init__(self, model: str, folder: Path, *, replicas: int, store_url: str) -> None:
        if not PYTHON.exists():
            pytest.skip("no Ray here: run `make test-fleet`")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        paths = {"PYTHONPATH": str(ROOT / "src"), "HEADWATER_FLEET_STATE": str(folder / "state")}
        self._environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}
        arguments = ["--replicas", str(replicas), "--model", model, "--port", str(port), "--admin-api-key", "admin"]
        sizes = ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "8192", "--enable-hierarchical-cache"]
        sizes += ["--hicache-write-policy", "write_through", "--hicache-storage-backend", "redis"]
        sizes += ["--hicache-storage-url", store_url, "--hicache-storage-prefetch-policy", "wait_complete"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(PYTHON), "-m", "headwater", "fleet", "up", *arguments, *sizes, "--log-level", "warning"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment,
            )  # fmt: skip

    def command(self, *words: str) -> None:
        words = ("-m", "headwater", "fleet", *words)
        subprocess.run([str(PYTHON), *words], env=self._environment, check=True, timeout=LIMIT_S)

    def scale(self, *words: str) -> None:
        self.command("scale", *words, "--url", self.url, "--admin-key", "admin")

    def replicas(self) -> dict[int, dict[str, Any]]:
        answer = httpx.get(f"{self.url}/fleet", headers=KEY, timeout=30, trust_env=False)
        return {entry["dp_rank"]: entry for entry in answer.json()["replicas"]} if answer.status_code == 200 else {}

    def serving(self) -> dict[int, dict[str, Any]]:
        return {rank: entry for rank, entry in self.replicas().items() if entry["serving"]}

    def until(self, holds: Callable[[], Any]) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            try:
                if holds():
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline_s, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def flush(self, **parameters: Any) -> httpx.Response:
        query = {"mode": "now", "tiers": "device,host,storage"} | parameters
        return httpx.post(f"{self.url}/flush_cache", params=query, headers=JSON, timeout=30, trust_env=False)


def ask(url: str, prompt: list[int], num_tokens: int = 1) -> int:
    """Cached tokens of the prompt."""
    return sum(ask_for_tiers(url, prompt, num_tokens).values())


def ask_for_tiers(url: str, prompt: list[int], num_tokens: int = 1) -> dict[str, int]:
    """Cached tokens of the prompt by tier."""
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling}
    answer = httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["meta_info"]["cached_tokens_details"]


def prompt_of(group: int, number: int = 0, length: int = 160) -> list[int]:
    """Prompts of a group share all but the last 16 tokens."""
    return [(group * 31 + i * 7) % 199 + 10 for i in range(length - 16)] + [10 + number] * 16


class Streams:
    """Clients that read one stream after another, and count how they ended."""

    def __init__(self, fleet: Fleet, count: int) -> None:
        self._fleet = fleet
        self.num_whole = 0
        self.broken: list[str] = []
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "a stream hangs"

    def _run(self, number: int) -> None:
        with httpx.Client(trust_env=False, timeout=60) as client:
            while not self._is_over.is_set():
                end = self._stream(client, prompt_of(100 + number))
                if end == "whole":
                    self.num_whole += 1
                else:
                    self.broken.append(end)

    def _stream(self, client: httpx.Client, prompt: list[int]) -> str:
        sampling = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
        last: dict[str, Any] = {}
        try:
            with client.stream("POST", f"{self._fleet.url}/generate", json=body) as answer:
                if answer.status_code != 200:
                    return answer.read().decode()
                for line in answer.iter_lines():
                    if line == "data: [DONE]":
                        return "whole" if last["meta_info"]["completion_tokens"] == NUM_TOKENS else str(last)
                    if line.startswith("data: "):
                        last = json.loads(line[6:])
        except httpx.TransportError as error:
            return repr(error)
        return json.dumps(last)


@pytest.fixture(scope="module")
def store() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def fleet(tiny_model: str, store: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    running = Fleet(tiny_model, tmp_path_factory.mktemp("fleet"), replicas=1, store_url=store.url)
    try:
        running.until(running.serving)
        yield running
    finally:
        if running.process.poll() is None:
            running.process.terminate()
        running.process.wait(LIMIT_S)


def test_the_fleet_grows_by_itself_under_streams(fleet: Fleet) -> None:
    with Streams(fleet, 4) as streams:
        limits = {"max_replicas": 3, "target_ongoing_requests": 0.5, "upscale_after_s": 0}
        httpx.post(f"{fleet.url}/fleet/scale", params=limits, headers=KEY, timeout=30, trust_env=False)
        fleet.until(lambda: len(fleet.serving()) == 3)
    assert not streams.broken and streams.num_whole > 0
    fleet.scale("3")  # and stays so from now on
    assert "autoscaling" not in httpx.get(f"{fleet.url}/fleet", headers=KEY, timeout=30, trust_env=False).json()


def test_requests_go_where_their_beginning_is_known(fleet: Fleet) -> None:
    """At least nine tenths of the hits that one engine with all the memory would have."""
    num_groups, num_rounds, num_shared = 9, 4, 144
    hits = sum(ask(fleet.url, prompt_of(group, turn)) for turn in range(num_rounds) for group in range(num_groups))
    assert hits >= 0.9 * num_groups * (num_rounds - 1) * num_shared
    running = [entry["num_running"] for entry in fleet.replicas().values()]
    assert running == [0, 0, 0]


def test_a_prefix_is_warmed_and_pinned_on_the_replica_that_requests_for_it_go_to(fleet: Fleet) -> None:
    with httpx.Client(base_url=fleet.url, headers=KEY, trust_env=False, timeout=60) as http:
        prefix = prompt_of(40)[:144]
        (item,) = http.post("/cache/warm", json={"input_ids": prefix}).json()["items"]
        assert item["computed_tokens"] == 144
        (pin,) = http.post("/cache/pin", json={"input_ids": prefix, "ttl_s": 60}).json()["pins"]
        assert pin["dp_rank"] == item["dp_rank"] and pin["cached_tokens"] >= 128 and pin["num_tokens"] == 144
        assert ask(fleet.url, prompt_of(40)) == 144
        assert [each["pin_id"] for each in http.get("/cache/pins").json()["pins"]] == [pin["pin_id"]]
        trees = http.get("/cache/tree").json()["engines"]
        assert [each["dp_rank"] for each in trees] == sorted(fleet.serving())
        assert http.delete(f"/cache/pin/{pin['pin_id']}").status_code == 200
        assert http.get("/cache/pins").json()["pins"] == []


def test_a_flush_is_answered_by_all_as_each_of_them_says(fleet: Fleet) -> None:
    prompts = {rank: prompt_of(20 + rank) for rank in fleet.serving()}
    for rank, entry in fleet.serving().items():
        ask(entry["url"], prompts[rank])
    answer = fleet.flush()
    assert answer.status_code == 200 and answer.json()["success"]
    entries = {entry["dp_rank"]: entry for entry in answer.json()["engines"]}
    assert sorted(entries) == sorted(fleet.replicas())
    for rank, replica in fleet.replicas().items():
        info = httpx.get(f"{replica['url']}/server_info", headers=KEY, timeout=30, trust_env=False).json()
        assert info["internal_states"][0]["cache_generation"] == entries[rank]["generation"]
        assert entries[rank]["freed"]["device"]["pages"] > 0
        assert ask(replica["url"], prompts[rank]) == 0


def store_holds(store: RedisServer, num_pages: int) -> bool:
    return sum(1 for _ in store.client().scan_iter(match=PAGE_PREFIX + b"*")) >= num_pages


def num_raised(store: RedisServer) -> int:
    """How often generations of the store were raised."""
    fields = store.client().hgetall(GENERATIONS)
    return sum(int(value) for name, value in fields.items() if name not in (b"start", b"run", b"aof"))


def test_a_shared_store_is_flushed_once_for_all(fleet: Fleet, store: RedisServer) -> None:
    urls = [entry["url"] for entry in fleet.serving().values()]
    prompts = [prompt_of(11 + number) for number in range(3)]
    for prompt in prompts:
        ask(urls[0], prompt)
    fleet.until(lambda: store_holds(store, len(prompts) * 9))
    assert ask_for_tiers(urls[1], prompts[1])["storage"] > 0
    before = num_raised(store)
    answer = fleet.flush(timeout=5)
    assert answer.status_code == 200 and answer.json()["still_warm"] == []
    assert len(answer.json()["engines"]) == 3
    assert num_raised(store) == before + 1
    assert [ask(url, prompt) for url, prompt in zip(urls, prompts, strict=True)] == [0, 0, 0]


def test_a_replica_that_hangs_during_a_flush_serves_nothing_until_it_has_flushed(fleet: Fleet) -> None:
    for entry in fleet.serving().values():
        ask(entry["url"], prompt_of(8))
    rank, hanging = max(fleet.serving().items())
    os.kill(hanging["pid"], signal.SIGSTOP)
    try:
        answer = fleet.flush(timeout=0.5)
        assert answer.status_code == 202 and not answer.json()["success"]
        entries = {entry["dp_rank"]: entry for entry in answer.json()["engines"]}
        assert entries.pop(rank)["pending"] is True
        assert len(entries) == 2 and all(entry["success"] for entry in entries.values())
        assert rank not in fleet.serving()
        assert ask(fleet.url, prompt_of(8)) == 0
    finally:
        os.kill(hanging["pid"], signal.SIGCONT)
    fleet.until(lambda: rank in fleet.serving())
    tiers = ask_for_tiers(hanging["url"], prompt_of(8))
    assert (tiers["device"], tiers["host"]) == (0, 0)  # another replica may have stored it since


def front_pid(fleet: Fleet) -> int:
    """The process of the front, which descends from that of the fleet."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_front = (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:headwater:Front")
            if is_front and fleet.process.pid in ancestors(int(folder.name)):
                return int(folder.name)
        except OSError:
            pass  # it has ended
    raise AssertionError("no front runs")


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def test_a_front_that_is_killed_right_after_a_change_has_not_forgotten_it(fleet: Fleet) -> None:
    with httpx.Client(base_url=fleet.url, headers=KEY, timeout=30, trust_env=False) as http:
        assert http.post("/update_weight_version", json={"new_version": "kept"}).status_code == 200
        before, pid = fleet.serving(), front_pid(fleet)
        os.kill(pid, signal.SIGKILL)
        fleet.until(lambda: not Path(f"/proc/{pid}").exists() and len(fleet.serving()) == len(before))
        assert {entry["name"] for entry in fleet.serving().values()} == {entry["name"] for entry in before.values()}
        assert http.get("/get_weight_version").json()["weight_version"] == "kept"


def test_a_replica_is_killed_in_the_middle_of_a_flush_under_load(fleet: Fleet) -> None:
    for entry in fleet.serving().values():
        ask(entry["url"], prompt_of(9))
    rank, killed = max(fleet.serving().items())
    with Streams(fleet, 6) as streams:
        fleet.until(lambda: sum(entry["num_running"] for entry in fleet.replicas().values()) >= 3)
        os.kill(killed["pid"], signal.SIGKILL)
        answer = fleet.flush(timeout=5)
        entries = {entry["dp_rank"]: entry for entry in answer.json()["engines"]}
        for number, entry in entries.items():
            assert entry["success"] or (number == rank and entry["pending"]), entry
        assert answer.status_code == (200 if answer.json()["success"] else 202)
        assert ask(fleet.url, prompt_of(9)) == 0
        fleet.until(lambda: rank not in fleet.replicas() and len(fleet.serving()) == 3)
        assert max(fleet.serving()) > rank  # the one that replaces it has a number of its own
    assert streams.num_whole > 0
    assert all("engine_gone" in end for end in streams.broken), streams.broken


def test_the_fleet_shrinks_by_itself_and_loses_no_request_and_no_page(fleet: Fleet, store: RedisServer) -> None:
    """Under streams, with a policy that has copied nothing down before."""
    policy = {"hicache_storage_backend": "redis", "url": store.url, "hicache_write_policy": "write_back"}
    limits = {"max_replicas": 3, "target_ongoing_requests": 100, "downscale_after_s": 1}
    with httpx.Client(base_url=fleet.url, headers=KEY, timeout=60, trust_env=False) as http:
        assert http.put("/hicache/storage-backend", json=policy).status_code == 200
        prompts = {rank: prompt_of(60 + rank) for rank in fleet.serving()}
        for rank, entry in fleet.serving().items():
            ask(entry["url"], prompts[rank])
        with Streams(fleet, 6) as streams:
            assert http.post("/fleet/scale", params=limits).json()["autoscaling"]["wanted"] == 3
            fleet.until(lambda: len(fleet.replicas()) == 1)
        assert not streams.broken and streams.num_whole > 0
        ((rank, left),) = fleet.serving().items()
        for owner, prompt in prompts.items():
            assert ask_for_tiers(left["url"], prompt)["device" if owner == rank else "storage"] >= 144


def test_nothing_is_left_when_the_fleet_ends(fleet: Fleet) -> None:
    left = [int(entry["pid"]) for entry in fleet.replicas().values()]
    fleet.command("down")
    assert fleet.process.wait(LIMIT_S) == 0, fleet.log.read_text()[-3000:]
    deadline_s = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
