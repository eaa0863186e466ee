"""`headwater fleet` on Ray with real processes (`make test-fleet`): scaling, routing, and flushes while replicas fail.

One fleet for the whole file, whose tests run in this order: Ray takes long to start. It serves two models of one
configuration with different weights, so the store and the routes have every chance to confuse them. Most tests are
about the first one.
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

from processes import ancestors_of, is_alive

sys.path.append(str(Path(__file__).parents[2] / "storage"))
from redis_server import RedisServer
from tiered import write_byte_tokenizer

from headwater.bench.machine import all_processes, command_of
from headwater.storage.redis.layout import GENERATIONS, PAGE_PREFIX
from tiny_models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.fleet, pytest.mark.timeout(600)]  # Ray may have to be started again
ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("HEADWATER_RAY_PYTHON") or ROOT / ".venv-ray" / "bin" / "python")
KEY = {"authorization": "Bearer admin"}
JSON = KEY | {"accept": "application/json"}
LIMIT_S = 120.0
RAY_IS_LATE = "The current node timed out during startup"
START_S = 180.0  # of Ray and Serve on a machine that is busy otherwise
NUM_TOKENS = 90  # of a stream; the model has room for 256
PAUSE_S = 0.5  # of a client between two streams; without it they take the cores that Ray needs to start replicas
MODEL, OTHER = "tiny", "other"
# one for all calls, since each new client reads certificates for 50 ms; connections do not outlive a replica's end
HTTP = httpx.Client(trust_env=False, verify=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
MODEL_HEADER = "serve_multiplexed_model_id"  # Ray Serve's; a replica by itself does not look at it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Fleet:
    """`headwater fleet up` and what it serves."""

    def __init__(self, models: dict[str, str], folder: Path, *, store_url: str) -> None:
        if not PYTHON.exists():
            pytest.skip("no Ray here: run `make test-fleet`")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        paths = {"PYTHONPATH": str(ROOT / "src"), "HEADWATER_FLEET_STATE": str(folder / "state")}
        self._environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}
        arguments = ["--replicas", "1", "--port", str(port), "--admin-api-key", "admin"]
        arguments += [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
        sizes = ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "8192", "--enable-hierarchical-cache"]
        sizes += ["--hicache-write-policy", "write_through", "--hicache-storage-backend", "redis"]
        sizes += ["--hicache-storage-url", store_url, "--hicache-storage-prefetch-policy", "wait_complete"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(PYTHON), "-m", "headwater", "fleet", "up", *arguments, *sizes, "--log-level", "warning"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment,
            )  # fmt: skip

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(LIMIT_S)

    def command(self, *words: str) -> None:
        words = ("-m", "headwater", "fleet", *words)
        subprocess.run([str(PYTHON), *words], env=self._environment, check=True, timeout=LIMIT_S)

    def scale(self, *words: str) -> None:
        self.command("scale", *words, "--model", MODEL, "--url", self.url, "--admin-key", "admin")

    @property
    def about(self) -> httpx.Client:
        """A client whose calls concern the first model."""
        return httpx.Client(
            base_url=self.url, params={"model": MODEL}, headers=JSON, timeout=60, trust_env=False, verify=False
        )

    def replicas(self, model: str = MODEL) -> dict[int, dict[str, Any]]:
        query = {"model": model}
        answer = HTTP.get(f"{self.url}/fleet", params=query, headers=KEY)
        return {entry["dp_rank"]: entry for entry in answer.json()["replicas"]} if answer.status_code == 200 else {}

    def serving(self, model: str = MODEL) -> dict[int, dict[str, Any]]:
        return {rank: entry for rank, entry in self.replicas(model).items() if entry["serving"]}

    def until(self, holds: Callable[[], Any], *, limit_s: float = LIMIT_S) -> None:
        deadline_s = time.monotonic() + limit_s
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
        """Of the first model, or of the `model` that is given."""
        query = {"mode": "now", "tiers": "device,host,storage", "model": MODEL} | parameters
        return HTTP.post(f"{self.url}/flush_cache", params=query, headers=JSON)


def ask(url: str, prompt: list[int], num_tokens: int = 1, *, model: str = MODEL) -> int:
    """Cached tokens of the prompt."""
    return sum(ask_for_tiers(url, prompt, num_tokens, model=model).values())


def ask_for_tiers(url: str, prompt: list[int], num_tokens: int = 1, *, model: str = MODEL) -> dict[str, int]:
    """Cached tokens of the prompt by tier."""
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling}
    answer = HTTP.post(f"{url}/generate", json=body, headers={MODEL_HEADER: model})
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
        with httpx.Client(trust_env=False, verify=False, timeout=60) as client:
            while not self._is_over.wait(PAUSE_S):
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
            url = f"{self._fleet.url}/generate?model={MODEL}"
            with client.stream("POST", url, json=body) as answer:
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
def models(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    other = tmp_path_factory.mktemp("other")
    make_tiny_model("llama", other, seed=1)
    write_byte_tokenizer(other)
    return {MODEL: tiny_model, OTHER: str(other)}


@pytest.fixture(scope="module")
def fleet(
    models: dict[str, str], store: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    running = started(models, tmp_path_factory, store)
    try:
        yield running
    finally:
        running.end()


def started(models: dict[str, str], folders: pytest.TempPathFactory, store: RedisServer) -> Fleet:
    """A fleet that serves. Ray gives its own processes 15 s to start, which may be too short on a busy machine."""
    for is_last in (False, False, True):
        running = Fleet(models, folders.mktemp("fleet"), store_url=store.url)
        try:
            running.until(lambda running=running: running.serving() and running.serving(OTHER), limit_s=START_S)
            return running
        except AssertionError:
            running.end()
            if is_last or RAY_IS_LATE not in running.log.read_text():
                raise
    raise AssertionError("unreachable")


def test_models_share_neither_requests_nor_pages(fleet: Fleet, store: RedisServer) -> None:
    """One store, one text, two models: what one has computed the other does not find, in memory or in the store."""
    prompt = prompt_of(50)
    listed = HTTP.get(f"{fleet.url}/v1/models").json()["data"]
    assert [each["id"] for each in listed] == [MODEL, OTHER]
    assert ask(fleet.url, prompt) == 0
    fleet.until(lambda: store_holds(store, 9))
    assert ask(fleet.url, prompt) >= 144 and ask(fleet.url, prompt, model=OTHER) == 0
    fleet.until(lambda: store_holds(store, 18))
    answer = fleet.flush(model=OTHER, tiers="device,host")
    assert answer.status_code == 200 and len(answer.json()["engines"]) == 1
    assert ask_for_tiers(fleet.url, prompt)["device"] >= 144
    assert ask_for_tiers(fleet.url, prompt, model=OTHER)["storage"] >= 144
    answer = HTTP.post(f"{fleet.url}/flush_cache?mode=now", headers=JSON)
    assert answer.status_code == 200 and answer.json()["success"]
    assert [(each["model"], each["success"]) for each in answer.json()["engines"]] == [(MODEL, True), (OTHER, True)]


def test_the_fleet_grows_by_itself_under_streams(fleet: Fleet) -> None:
    with Streams(fleet, 4) as streams:
        limits = {"max_replicas": 3, "target_ongoing_requests": 0.5, "upscale_after_s": 0}
        with fleet.about as http:
            http.post("/fleet/scale", params=limits)
        fleet.until(lambda: len(fleet.serving()) == 3)
    assert not streams.broken and streams.num_whole > 0
    fleet.scale("3")  # and stays so from now on
    with fleet.about as http:
        assert "autoscaling" not in http.get("/fleet").json()


def test_requests_go_where_their_beginning_is_known(fleet: Fleet) -> None:
    """At least nine tenths of the hits that one engine with all the memory would have."""
    num_groups, num_rounds, num_shared = 9, 4, 144
    hits = sum(ask(fleet.url, prompt_of(group, turn)) for turn in range(num_rounds) for group in range(num_groups))
    assert hits >= 0.9 * num_groups * (num_rounds - 1) * num_shared
    running = [entry["num_running"] for entry in fleet.replicas().values()]
    assert running == [0, 0, 0]


def test_a_prefix_is_warmed_and_pinned_on_the_replica_that_requests_for_it_go_to(fleet: Fleet) -> None:
    with fleet.about as http:
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
        info = HTTP.get(f"{replica['url']}/server_info", headers=KEY).json()
        assert info["internal_states"][0]["cache_generation"] == entries[rank]["generation"]
        cut = [entries[rank][kind]["device"]["pages"] for kind in ("freed", "retired")]
        assert sum(cut) > 0  # retired: pages that were on their way to the host
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
    for pid in all_processes():
        is_front = "".join(command_of(pid)).startswith("ray::ServeReplica:headwater:Front")
        if is_front and fleet.process.pid in ancestors_of(pid):
            return pid
    raise AssertionError("no front runs")


def names_of(fleet: Fleet) -> set[str]:
    """Of the replicas that serve, of both models."""
    return {entry["name"] for model in (MODEL, OTHER) for entry in fleet.serving(model).values()}


def test_a_front_that_is_killed_right_after_a_change_has_not_forgotten_it(fleet: Fleet) -> None:
    with fleet.about as http:
        assert http.post("/update_weight_version", json={"new_version": "kept"}).status_code == 200
        before, pid = names_of(fleet), front_pid(fleet)
        os.kill(pid, signal.SIGKILL)
        fleet.until(lambda: not is_alive(pid) and len(names_of(fleet)) == len(before))
        assert names_of(fleet) == before
        assert http.get("/get_weight_version").json()["weight_version"] == "kept"
        assert http.get("/get_weight_version", params={"model": OTHER}).json()["weight_version"] != "kept"


def text_of(url: str) -> list[int]:
    body = {"input_ids": prompt_of(70), "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}}
    return HTTP.post(f"{url}/generate", json=body).json()["output_ids"]


def test_tensors_of_a_trainer_reach_all_replicas(fleet: Fleet, models: dict[str, str]) -> None:
    """The weights of the second model, sent to the first one: then both give one text."""
    wanted = text_of(next(iter(fleet.serving(OTHER).values()))["url"])
    assert all(text_of(entry["url"]) != wanted for entry in fleet.serving().values())
    weights = (Path(models[OTHER]) / "model.safetensors").read_bytes()
    with fleet.about as http:
        headers = {"content-type": "application/vnd.safetensors"}
        answer = http.post("/update_weights_from_tensor", content=weights, headers=headers)
    assert answer.status_code == 200 and len(answer.json()["engines"]) == 3, answer.text
    assert [text_of(entry["url"]) for entry in fleet.serving().values()] == [wanted] * 3


def test_a_replica_is_killed_in_the_middle_of_a_flush_under_load(fleet: Fleet) -> None:
    """The one that replaces it has the trainer's tensors before it serves."""
    sent = text_of(next(iter(fleet.serving().values()))["url"])
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
    assert {tuple(text_of(entry["url"])) for entry in fleet.serving().values()} == {tuple(sent)}
    assert streams.num_whole > 0
    assert all("engine_gone" in end for end in streams.broken), streams.broken


def test_the_fleet_shrinks_by_itself_and_loses_no_request_and_no_page(fleet: Fleet, store: RedisServer) -> None:
    """Under streams, with a policy that has copied nothing down before."""
    policy = {"hicache_storage_backend": "redis", "url": store.url, "hicache_write_policy": "write_back"}
    limits = {"max_replicas": 3, "target_ongoing_requests": 100, "downscale_after_s": 1}
    with fleet.about as http:
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
    left = [int(entry["pid"]) for model in (MODEL, OTHER) for entry in fleet.replicas(model).values()]
    fleet.command("down")
    assert fleet.process.wait(LIMIT_S) == 0, fleet.log.read_text()[-3000:]
    deadline_s = time.monotonic() + 15
    while any(map(is_alive, left)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not [pid for pid in left if is_alive(pid)]
