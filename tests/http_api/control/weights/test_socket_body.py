"""Large bodies that a thread reads from the socket of a real server: whole, torn, refused, slow, and the next ones."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_under_test import PLAIN, served
from loop_engines import LoopEngine, loop_engines

from headwater.devices.safetensors_header import LENGTH_BYTES, build_header
from headwater.http_api import connection
from headwater.http_api.socket_body import Sink, SocketBody, plain_length
from headwater.transports.staging import StagingArea

ROUTE = "/update_weights_from_tensor"
SAFETENSORS = {"content-type": "application/vnd.safetensors"}
MIB = 1 << 20


def large(*names: str, num_bytes: int = 6 * MIB) -> bytes:
    """A bucket of tiny tensors behind a header that is filled up with blanks."""
    shapes = {"weight": (1,), "bias": (2,)}
    header = build_header([(name, "F32", shapes.get(name, (3,))) for name in names])[LENGTH_BYTES:].ljust(num_bytes)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + bytes(4 * sum(shapes.get(n, (3,))[0] for n in names))


BOTH, UNKNOWN = large("weight", "bias"), large("other")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the bodies that a thread reads."""
    seen: list[int] = []
    read_into = SocketBody.read_into

    async def noted(self: SocketBody, sink: Sink) -> None:
        seen.append(self.num_bytes)
        await read_into(self, sink)

    monkeypatch.setattr(SocketBody, "read_into", noted)
    return seen


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


@pytest.fixture
def url(engine: LoopEngine, shm: Path) -> Iterator[str]:
    with served(engine, staging=StagingArea(shm, max_bytes=30 * MIB)) as (url, _):
        yield url


def files(shm: Path) -> list[str]:
    return [path.name for path in shm.rglob("*.*") if path.is_file()]


def wait_for(condition: Any) -> None:
    until_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def connect(url: str, num_bytes: int, *more: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    lines = [f"POST {ROUTE} HTTP/1.1", f"Host: {host}", "Content-Type: application/octet-stream", *more]
    sock = socket.create_connection((host, int(port)), timeout=30)
    sock.sendall("\r\n".join([*lines, f"Content-Length: {num_bytes}", "", ""]).encode())
    return sock


def answer_on(sock: socket.socket) -> tuple[int, dict[str, Any]]:
    stream = sock.makefile("rb")
    status = int(stream.readline().split()[1])
    length = 0
    while line := stream.readline().strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, json.loads(stream.read(length)) if length else {}


def test_a_connection_serves_on_after_a_large_body(url: str, reads: list[int], shm: Path) -> None:
    """The parser has seen nothing of the bodies; the next requests on the connection are read by it again."""
    with httpx.Client(base_url=url, timeout=60, **PLAIN) as http:
        for _ in range(2):
            answer = http.post(ROUTE, content=BOTH, headers=SAFETENSORS)
            assert (answer.status_code, answer.json()["success"]) == (200, True), answer.text
            assert http.get("/health").status_code == 200
        refused = http.post(ROUTE, content=UNKNOWN, headers=SAFETENSORS)
        assert refused.status_code == 400 and "no tensor 'other'" in refused.text
        small = http.post(ROUTE, content=large("weight", "bias", num_bytes=200), headers=SAFETENSORS)
        assert small.status_code == 200, small.text
    assert reads == [len(BOTH), len(BOTH), len(UNKNOWN)]
    wait_for(lambda: files(shm).count("000001.safetensors") == 1 and not list(shm.rglob("*.part")))


def test_what_is_sent_is_what_is_staged(url: str, shm: Path) -> None:
    assert httpx.post(url + ROUTE, content=BOTH, headers=SAFETENSORS, timeout=60, **PLAIN).status_code == 200
    (staged,) = shm.rglob("000001.safetensors")
    assert staged.read_bytes() == BOTH


def test_a_sender_that_leaves_leaves_nothing(url: str, reads: list[int], shm: Path) -> None:
    with connect(url, len(BOTH)) as sock:
        sock.sendall(BOTH[: 3 * MIB])
        wait_for(lambda: reads)
    wait_for(lambda: not list(shm.rglob("*.part")))
    assert httpx.get(f"{url}/health", **PLAIN).status_code == 200
    assert httpx.post(url + ROUTE, content=BOTH, headers=SAFETENSORS, timeout=60, **PLAIN).status_code == 200


def test_a_sender_that_waits_for_100_continue(url: str) -> None:
    """curl does, with large bodies."""
    with connect(url, len(BOTH), "Expect: 100-continue") as sock:
        assert sock.recv(1000).startswith(b"HTTP/1.1 100")
        sock.sendall(BOTH)
        assert answer_on(sock)[0] == 200


def test_a_body_that_is_refused_in_its_middle_is_read_to_its_end(
    url: str, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sender reads nothing before it has sent everything: it would wait, or see a broken connection."""
    area_limit = 9 * MIB
    monkeypatch.setattr(StagingArea, "_limit", lambda self: area_limit)
    monkeypatch.setattr("headwater.transports.staging.BucketFile.reserve", lambda self, num_bytes: None)
    data = large("weight", "bias", num_bytes=20 * MIB)
    with connect(url, len(data)) as sock:
        sock.sendall(data)
        status, answer = answer_on(sock)
        assert status == 413 and "--max-staged-weights-bytes" in answer["message"]
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_on(sock)[0] == 200
    assert reads == [len(data)]


def test_a_slow_body_is_408(url: str, reads: list[int], shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_GRACE_S", 0.3)
    monkeypatch.setattr(connection, "MIN_BODY_BYTES_PER_S", 1 << 30)
    with connect(url, len(BOTH)) as sock:
        sock.sendall(BOTH[:5000])
        assert answer_on(sock)[0] == 408
    assert reads
    wait_for(lambda: not list(shm.rglob("*.part")))


def test_a_chunked_body_takes_the_old_way(url: str, reads: list[int]) -> None:
    answer = httpx.post(url + ROUTE, content=iter([BOTH[:MIB], BOTH[MIB:]]), headers=SAFETENSORS, timeout=60, **PLAIN)
    assert answer.status_code == 200, answer.text
    assert reads == []


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-length": "5000000"}, 5_000_000),
        ({"content-length": "5000"}, 0),
        ({"content-length": "-5"}, 0),
        ({}, 0),
        ({"content-length": "5000000", "content-encoding": "gzip"}, 0),
        ({"transfer-encoding": "chunked"}, 0),
        ({"content-length": "5000000", "upgrade": "h2c"}, 0),
    ],
)
def test_which_bodies_a_thread_may_read(headers: dict[str, str], expected: int) -> None:
    assert plain_length([(name.encode(), value.encode()) for name, value in headers.items()]) == expected
