"""The events of a server in the index of a real router: NVIDIA Dynamo's, from its wheel (`make routers`).

Before these tests, routers dropped every event: hashes of bytes, a batch of four, tiers of unknown names.
"""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from running_server import RunningServer
from tiered import HOST, prompt, wait_idle, wait_stored

from headwater.kv_events import EventBatch, encode_batch, stored_in_tree
from processes import held_port, number_of

pytestmark = pytest.mark.slow
PYTHON = Path(__file__).parents[3] / ".venv-routers" / "bin" / "python"
PAGE = 16
NUM_BLOCKS = 7  # of a prompt
NOTHING = {"device": 0, "host": 0, "storage": 0}
ON_DEVICE = dict.fromkeys(NOTHING, NUM_BLOCKS)  # a tier's number includes the tiers above it
ON_HOST = ON_DEVICE | {"device": 0}
IN_STORE = ON_HOST | {"host": 0}
LIMIT_S = 30.0


def bind_anywhere(publisher: zmq.Socket) -> str:
    """Where it publishes now."""
    publisher.bind("tcp://127.0.0.1:*")
    return publisher.getsockopt_string(zmq.LAST_ENDPOINT)


class Index:
    """A process of dynamo_index.py."""

    def __init__(self, endpoint: str, *, replay_endpoint: str = "") -> None:
        if not PYTHON.exists():
            if os.environ.get("CI") == "true":
                pytest.fail("CI needs the environment of `make routers`")
            pytest.skip("no router's index here: run `make routers`")
        script = str(Path(__file__).with_name("dynamo_index.py"))
        self._process = subprocess.Popen(
            [str(PYTHON), script, endpoint, replay_endpoint, str(PAGE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._read() == "ready"

    def blocks(self, number: int, **more: object) -> dict[str, int]:
        """What the index knows of a prompt, by tier."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"token_ids": prompt(number)} | more) + "\n")
        self._process.stdin.flush()
        return self._read()

    def wait_for(self, number: int, expected: dict[str, int], **more: object) -> None:
        deadline = time.monotonic() + LIMIT_S
        while (found := self.blocks(number, **more)) != expected:
            assert time.monotonic() < deadline, f"prompt {number}: {found} instead of {expected}"
            time.sleep(0.05)

    def _read(self) -> object:  # type: ignore[override]
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the index has ended"
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class Relay:
    """Passes a server's batches on, and drops them while `is_dropping`. Its own endpoint is `endpoint`."""

    def __init__(self, upstream: str) -> None:
        self.is_dropping = False
        self.num_dropped = 0
        self._context = zmq.Context()
        self._from, self._to = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        self._from.connect(upstream)
        self._from.subscribe(b"")
        self.endpoint = bind_anywhere(self._to)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_closing:
            if not self._from.poll(50):
                continue
            frames = self._from.recv_multipart()
            if self.is_dropping:
                self.num_dropped += 1
            else:
                self._to.send_multipart(frames)

    def close(self) -> None:
        self._is_closing = True
        self._thread.join(10)
        self._context.destroy(linger=0)


class Published:
    """A server that publishes events, and an index that hears of them through a relay."""

    def __init__(self, model: str, folder: Path) -> None:
        holders = held_port(), held_port()
        endpoint, replay = (f"tcp://127.0.0.1:{number_of(holder)}" for holder in holders)
        self.server = RunningServer(
            "--model", model, "--dtype", "float32", "--max-total-tokens", "2048", *HOST,
            "--hicache-ratio", "2", "--kv-events-endpoint", endpoint, "--kv-events-replay-endpoint", replay,
        )  # fmt: skip
        self.folder = folder
        with contextlib.ExitStack() as stack:
            for holder in holders:
                stack.enter_context(holder)
            stack.enter_context(self.server)
            self.server.wait_healthy()
            self.relay = Relay(endpoint)
            stack.callback(self.relay.close)
            self.index = Index(self.relay.endpoint, replay_endpoint=replay)
            stack.callback(self.index.close)
            self.wait_connected()
            self._ending = stack.pop_all()

    def wait_connected(self) -> None:
        """A subscription takes a while; what was published before it is missed, until a later batch shows the gap."""
        deadline = time.monotonic() + LIMIT_S
        while self.index.blocks(0) == NOTHING:
            assert time.monotonic() < deadline, "no event reaches the index"
            self.generate(0)
            self.flush()
            self.generate(0)
            time.sleep(0.2)

    def generate(self, number: int, **more: object) -> None:
        body = {"input_ids": prompt(number), "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        assert self.server.post("/generate", json=body | more).status_code == 200
        wait_idle(self.server)

    def flush(self, **query: str) -> None:
        answer = self.server.post("/flush_cache", params={"mode": "drain", "timeout": "20"} | query)
        assert answer.status_code == 200, answer.text

    def close(self) -> None:
        self._ending.close()


@pytest.fixture(scope="module")
def published(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    made = Published(tiny_model, tmp_path_factory.mktemp("events-store"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def empty(published: Published) -> None:
    published.flush()
    published.index.wait_for(0, NOTHING)


def test_blocks_are_known_until_a_flush(published: Published) -> None:
    published.generate(1)
    published.index.wait_for(1, ON_DEVICE)
    assert published.index.blocks(2) == NOTHING
    published.flush()
    published.index.wait_for(1, NOTHING)


def test_salted_blocks_are_found_with_the_salt_only(published: Published) -> None:
    published.generate(1, cache_salt="tenant")
    published.index.wait_for(1, ON_DEVICE, cache_salt="tenant")
    assert published.index.blocks(1) == NOTHING
    published.generate(2)
    published.flush(cache_salt="tenant")
    published.index.wait_for(1, NOTHING, cache_salt="tenant")
    published.index.wait_for(2, ON_DEVICE)


def test_a_flush_of_one_tier_leaves_the_other(published: Published) -> None:
    published.generate(1)
    published.index.wait_for(1, ON_DEVICE)
    published.flush(tiers="device")
    published.index.wait_for(1, ON_HOST)
    published.flush(tiers="host")
    published.index.wait_for(1, NOTHING)
    published.generate(2)
    published.index.wait_for(2, ON_DEVICE)
    published.flush(tiers="host")
    published.generate(3)
    published.index.wait_for(3, ON_DEVICE)
    assert published.index.blocks(2) == ON_DEVICE, "the device was not flushed"


def test_evicted_pages_are_known_on_the_host_only(published: Published) -> None:
    """The device holds 17 prompts."""
    for number in range(24):
        published.generate(number)
    published.index.wait_for(23, ON_DEVICE)
    published.index.wait_for(0, ON_HOST)


def test_blocks_of_a_store_are_known(published: Published) -> None:
    body = {"hicache_storage_backend": "file", "directory": str(published.folder)}
    attached = published.server.put("/hicache/storage-backend", json=body)
    assert attached.status_code == 200, attached.text
    published.generate(3)
    wait_stored(published.server, NUM_BLOCKS)
    published.flush(tiers="device,host")
    published.index.wait_for(3, IN_STORE)
    published.flush(tiers="device,host,storage")
    published.index.wait_for(3, NOTHING)
    assert published.server.delete("/hicache/storage-backend").status_code == 200


def test_missed_batches_are_replayed(published: Published) -> None:
    """The index sees the gap in the numbers, and asks the server for what it missed."""
    published.relay.is_dropping = True
    published.generate(1)
    deadline = time.monotonic() + LIMIT_S
    while not published.relay.num_dropped:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    published.relay.is_dropping = False
    published.generate(2)
    published.index.wait_for(2, ON_DEVICE)
    published.index.wait_for(1, ON_DEVICE)


def test_an_index_starts_from_the_tree(published: Published) -> None:
    """Its events are those of the published stream."""
    published.generate(1)
    published.generate(2, cache_salt="tenant")
    (entry,) = published.server.get("/cache/tree?blocks=true").json()["engines"]
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        index = Index(bind_anywhere(socket))
        try:
            deadline = time.monotonic() + LIMIT_S
            number = 0
            while index.blocks(1) == NOTHING:
                assert time.monotonic() < deadline
                batch = EventBatch(ts=time.time(), events=stored_in_tree(entry))
                socket.send_multipart((b"", number.to_bytes(8, "big"), encode_batch(batch)))
                number += 1
                time.sleep(0.2)
            index.wait_for(1, ON_DEVICE)
            index.wait_for(2, ON_DEVICE, cache_salt="tenant")
            assert index.blocks(2) == NOTHING
        finally:
            index.close()
        socket.close(linger=0)
