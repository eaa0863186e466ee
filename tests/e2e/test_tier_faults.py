"""Stores and hosts that fail under load, with real servers: no request is lost or wrong, none waits for long."""

import contextlib
import itertools
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from running_server import RunningServer
from tiered import DEVICE, HOST, NUM_CACHED, NUM_PROMPTS, ask, details, put_store, store_of, wait_idle, wait_stored

sys.path.append(str(Path(__file__).parents[1] / "storage"))
from redis_server import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.load]
NUM_PAGES = NUM_PROMPTS * NUM_CACHED // 16  # of all prompts
LONGEST_S = 12.0  # that a request may take on a machine that is busy; a store that hangs is given 5 s a call
HANG_S = float(os.environ.get("HEADWATER_HANG_S", "5"))  # that the store hangs; in CI 30
JSON = {"accept": "application/json"}


class Load:
    """Threads that ask all prompts over and over while something goes wrong; checks every answer."""

    def __init__(self, server: RunningServer, expected: list[list[int]], *, num_threads: int = 3) -> None:
        self.slowest_s = 0.0
        self.num_answers = 0
        self._server, self._expected = server, expected
        self._errors: list[str] = []
        self._is_over = False
        self._threads = [threading.Thread(target=self._work, args=(start,)) for start in range(num_threads)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join(180)
        assert not self._errors, self._errors[:3]
        assert self._server.health() == 200
        assert self.slowest_s < LONGEST_S, f"a request took {self.slowest_s:.1f} s"

    def wait_for(self, num_answers: int, *, limit_s: float = 90.0) -> None:
        """Until so many more requests have been answered."""
        wanted, give_up_s = self.num_answers + num_answers, time.monotonic() + limit_s
        while self.num_answers < wanted and not self._errors:
            assert time.monotonic() < give_up_s, f"{wanted - self.num_answers} answers did not come"
            time.sleep(0.02)

    def _work(self, start: int) -> None:
        for number in itertools.count(start * 5):
            if self._is_over:
                return
            number %= NUM_PROMPTS
            began_s = time.monotonic()
            try:
                answer = ask(self._server, number)
                if answer["output_ids"] != self._expected[number]:
                    self._errors.append(f"prompt {number}, found on {details(answer)}")
            except Exception as error:
                self._errors.append(f"{type(error).__name__}: {error}")
                return
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
            self.num_answers += 1


def tiered(model: str, *more: str) -> RunningServer:
    return RunningServer("--model", model, *DEVICE, *HOST, *more).wait_healthy()


def file_server(model: str, folder: Path, *more: str) -> RunningServer:
    return tiered(model, "--hicache-storage-backend", "file", "--hicache-storage-dir", str(folder), *more)


def flush(server: RunningServer, query: str = "hold=true&timeout=20") -> tuple[int, dict]:
    answer = server.post(f"/flush_cache?{query}", headers=JSON)
    return answer.status_code, answer.json()


def delete(folder: Path) -> None:
    """Delete a folder in which others go on writing."""
    for _ in range(50):
        try:
            shutil.rmtree(folder)
            return
        except OSError:
            continue  # something new has come into it
    raise AssertionError(f"{folder} cannot be deleted")


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


def test_a_store_that_fails_half_of_its_calls_and_then_hangs(
    tiny_model: str, redis: RedisServer, expected: list[list[int]]
) -> None:
    with FaultyProxy(Path(redis.url.removeprefix("unix://"))) as proxy:
        store = ("--hicache-storage-backend", "redis", "--hicache-storage-url", proxy.url)
        with tiered(tiny_model, *store) as server:
            with Load(server, expected) as load:
                load.wait_for(NUM_PROMPTS)
                proxy.fail_rate = 0.5
                load.wait_for(NUM_PROMPTS)
                assert flush(server)[0] == 200
                load.wait_for(NUM_PROMPTS)
            assert proxy.num_failed >= 5, "nothing failed"
            proxy.fail_rate = 0.0
            _check_hang(server, redis, expected)


def _check_hang(server: RunningServer, redis: RedisServer, expected: list[list[int]]) -> None:
    """Neither requests nor flushes wait for a store that has stopped; a flush of it is owed until it goes on."""
    redis.stop_answering()
    try:
        with Load(server, expected) as load:
            load.wait_for(NUM_PROMPTS // 2)
            began_s = time.monotonic()
            assert flush(server)[0] == 200
            status, facts = flush(server, "mode=now&tiers=device,host,storage&timeout=1")
            assert (status, facts["pending"]) == (202, ["storage"])
            assert time.monotonic() - began_s < LONGEST_S
            load.wait_for(NUM_PROMPTS // 2)
            time.sleep(max(0.0, began_s + HANG_S - time.monotonic()))
            load.wait_for(NUM_PROMPTS // 2)
    finally:
        redis.answer_again()
    give_up_s = time.monotonic() + 60
    while flush(server, "mode=now&tiers=storage&timeout=5")[0] != 200:
        assert time.monotonic() < give_up_s, "the store is back, and is still not flushed"
    assert details(ask(server, 0))["storage"] == 0, "from before the flush"


@pytest.fixture(scope="module")
def shared(tiny_model: str) -> Iterator[RunningServer]:
    """A server without a store; a test gives it one, and takes it away."""
    with tiered(tiny_model, "--hicache-ratio", "1") as server:
        yield server


@contextlib.contextmanager
def with_store(server: RunningServer, folder: Path) -> Iterator[None]:
    """This folder is the store, and nothing is on the other tiers."""
    answer = put_store(server, hicache_storage_backend="file", directory=str(folder))
    assert answer.status_code == 200, answer.text
    assert flush(server)[0] == 200
    yield
    assert server.delete("/hicache/storage-backend").status_code == 200


def num_refused(server: RunningServer) -> int:
    """Tokens that a store did not take."""
    dropped = server.get("/cache").json()["dropped_tokens"]
    return sum(count for cause, count in dropped.items() if cause.startswith("persist_"))


@pytest.fixture(params=["tmpfs", "file size limit"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[RunningServer], None]]]:
    """A folder whose disk is full, and what makes room there. The second works without the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "file size limit":

        def lift(server: RunningServer) -> None:
            resource.prlimit(server.engine_pid(), resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

        yield folder, lift
        return
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("no mount command here")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    grow = [mount, "-o", "remount,size=40m", str(folder)]
    try:
        yield folder, lambda server: subprocess.run(grow, check=True) and None
    finally:
        subprocess.run([umount, "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_writes_and_not_serving(
    shared: RunningServer, full_disk: tuple[Path, Callable[[RunningServer], None]], expected: list[list[int]]
) -> None:
    folder, make_room = full_disk
    with with_store(shared, folder / "s"):
        before = num_refused(shared)
        if not folder.is_mount():
            limits = (8_000, resource.RLIM_INFINITY)  # a page of this model has 12,000 bytes
            resource.prlimit(shared.engine_pid(), resource.RLIMIT_FSIZE, limits)
        with Load(shared, expected) as load:
            load.wait_for(2 * NUM_PROMPTS)
            stored = store_of(shared)
            assert stored["num_pages"] < NUM_PAGES // 2, "the disk was not full"
            assert flush(shared)[0] == 200
            make_room(shared)
            load.wait_for(NUM_PROMPTS)
        assert num_refused(shared) > before
        give_up_s = time.monotonic() + 60
        while store_of(shared)["num_pages"] < NUM_PAGES // 2:  # the breaker lets a probe through within 30 s
            assert time.monotonic() < give_up_s, store_of(shared)
            time.sleep(1.0)
            assert flush(shared)[0] == 200
            for number in range(NUM_PROMPTS):
                assert ask(shared, number)["output_ids"] == expected[number]


def test_a_host_that_holds_less_than_a_prompt(tiny_model: str, tmp_path: Path, expected: list[list[int]]) -> None:
    """Copies find no room, restores have no source; what is lost are hits."""
    with file_server(tiny_model, tmp_path / "s", "--hicache-ratio", "0.2") as server:
        with Load(server, expected, num_threads=4) as load:
            load.wait_for(2 * NUM_PROMPTS)
            assert flush(server)[0] == 200
        assert server.get("/cache").json()["dropped_tokens"]["host_full"] > 0
        wait_idle(server)
        tiers = server.get("/cache").json()["tiers"]
        assert all(tier["free_pages"] + tier["evictable_pages"] == tier["capacity_pages"] for tier in tiers.values())


def test_folder_deleted_and_store_replaced_and_flushed_in_every_way_under_load(
    shared: RunningServer, tmp_path: Path, expected: list[list[int]]
) -> None:
    """Nobody waits for idle to delete, detach, attach or flush: all of it happens to a server that is busy."""
    places = itertools.cycle([tmp_path / "a", tmp_path / "b"])
    server = shared
    with with_store(server, tmp_path / "a"):
        with Load(server, expected) as load:
            scopes = itertools.cycle(["", "&cache_salt=nobody", "&cache_salt=", "&extra_key="])
            every = ("device", "host", "storage", "device,host", "device,host,storage")
            for tiers, mode in itertools.product(every, ("now", "drain", "idle&hold=true")):
                status, facts = flush(server, f"tiers={tiers}&mode={mode}&timeout=10{next(scopes)}")
                assert status == 200, facts
                load.wait_for(2)
            delete(tmp_path / "a")
            load.wait_for(NUM_PROMPTS)
            for _ in range(2):
                assert server.delete("/hicache/storage-backend").status_code == 200
                load.wait_for(3)
                answer = put_store(server, hicache_storage_backend="file", directory=str(next(places)))
                assert answer.status_code == 200, answer.text
                load.wait_for(NUM_PROMPTS // 2)
        assert flush(server, "tiers=device,host,storage&timeout=20")[0] == 200
        assert details(ask(server, 1)) == {"device": 0, "host": 0, "storage": 0}
        wait_stored(server, NUM_CACHED // 16)
        assert flush(server)[0] == 200
        assert details(ask(server, 1))["storage"] == NUM_CACHED, "the store is in use again"
