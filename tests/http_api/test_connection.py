"""What clients do to a server before and beside their requests: each attack ends, and others are served meanwhile."""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from api_under_test import PLAIN, saying, served

from headwater.http_api import connection
from headwater.http_api.connection import Connection, ConnectionLimits
from headwater.messages.generation import Generate
from scripted_engine import ScriptedEngine

HEAD = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as sock:
        yield sock


def read_all(sock: socket.socket) -> bytes:
    """Until the server closes; a reset is an end, too."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            received += piece
    return received


def read_head(sock: socket.socket) -> bytes:
    """Of an answer: it may come in any number of pieces."""
    received = b""
    while b"\r\n\r\n" not in received and (piece := sock.recv(65536)):
        received += piece
    return received


def status_and_error(answer: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower(), head
    return int(head.split()[1]), json.loads(body)["error"]


def send_until_closed(sock: socket.socket, piece: bytes, *, most: int) -> int:
    """Bytes that the server's side took before it closed."""
    num_sent = 0
    with contextlib.suppress(ConnectionError):
        while num_sent < most:
            num_sent += sock.send(piece)
    return num_sent


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /health HTTP/1.1\r\nx-long: ",
        b"GET /",
        b"GET /health HTTP/1.1\r\nx",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1;extension=",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\ntrailer: ",
    ],
    ids=["value", "url", "name", "chunk-extension", "trailer"],
)
def test_headers_without_bound_are_a_431_long_before_they_are_all_read(engine: ScriptedEngine, begin: bytes) -> None:
    with served(engine) as (url, _), connected(url) as sock:
        sock.sendall(begin)
        num_sent = send_until_closed(sock, b"a" * 65536, most=64 << 20)
        assert num_sent < 16 << 20, "the rest is neither read nor kept"
        answer = read_all(sock)
        assert not answer or status_and_error(answer)[0] in (400, 431)  # the system may drop what it had for us
        assert httpx.get(f"{url}/health", **PLAIN).status_code == 200


@pytest.mark.parametrize(
    "lines",
    [b"x-long: " + b"a" * 70_000 + b"\r\n", b"".join(b"x-%d: a\r\n" % n for n in range(300))],
    ids=["bytes", "number"],
)
def test_too_much_header_tells_what_is_accepted(engine: ScriptedEngine, lines: bytes) -> None:
    with served(engine) as (url, _), connected(url) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + lines + b"\r\n")
        status, error = status_and_error(read_all(sock))
        assert (status, error["code"]) == (431, "headers_too_large")
        assert "at most" in str(error["message"])


def test_large_but_accepted_headers_pass(engine: ScriptedEngine) -> None:
    with served(engine) as (url, _):
        assert httpx.get(f"{url}/health", headers={"x-long": "a" * 60_000}, **PLAIN).status_code == 200


@pytest.mark.parametrize("begin", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nx-slow: 1"])
def test_a_request_that_is_not_sent_is_given_up(engine: ScriptedEngine, begin: bytes) -> None:
    limits = ConnectionLimits(header_timeout_s=0.3)
    with served(engine, connections=limits) as (url, _), connected(url) as sock:
        sock.sendall(begin)
        status, error = status_and_error(read_all(sock))
        assert (status, error["code"]) == (408, "headers_late")


def test_blank_lines_do_not_keep_an_idle_connection(engine: ScriptedEngine) -> None:
    """They end uvicorn's own wait for a next request."""
    limits = ConnectionLimits(header_timeout_s=0.3)
    with served(engine, connections=limits) as (url, _), connected(url) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in read_head(sock)
        sock.sendall(b"\r\n\r\n")
        assert status_and_error(read_all(sock))[0] == 408


def test_a_connection_stays_for_further_requests_as_long_as_the_limit_says(engine: ScriptedEngine) -> None:
    with served(engine, connections=ConnectionLimits(keep_alive_s=0.5)) as (url, _), connected(url) as sock:
        for _ in range(2):
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b" 200 " in read_head(sock)
            answered_s = time.monotonic()
        rest = read_all(sock)
        assert not rest.startswith(b"HTTP") and time.monotonic() - answered_s > 0.4


def test_a_body_that_trickles_is_cut_off(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_GRACE_S", 0.3)
    with served(engine) as (url, state), connected(url) as sock:
        sock.sendall(HEAD + b"content-length: 100000\r\n\r\n{")
        began_s = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began_s < 10:
                sock.sendall(b" ")
                time.sleep(0.05)
                sock.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    if answer := sock.recv(65536):
                        break
        sock.settimeout(20)
        status, error = status_and_error(answer + read_all(sock))
        assert (status, error["code"]) == (408, "body_late")
        assert state.is_serving


def test_a_slow_body_of_honest_speed_is_read(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_GRACE_S", 0.4)
    engine.script.reply = saying("yes")
    body = json.dumps({"text": "a", "rid": "r" * 10}).encode() + b" " * 200_000
    with served(engine) as (url, _), connected(url) as sock:
        sock.sendall(HEAD + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
        for start in range(0, len(body), 20_000):
            sock.sendall(body[start : start + 20_000])
            time.sleep(0.1)  # a second and more in all
        assert b" 200 " in read_all(sock)


def test_an_endless_body_behind_an_answer_is_cut_off(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused key is answered before the body is read."""
    monkeypatch.setattr(connection, "BODY_GRACE_S", 0.3)
    with served(engine, api_key="key") as (url, _), connected(url) as sock:
        sock.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        assert b" 401 " in read_head(sock)
        began_s = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began_s < 10:
                sock.sendall(b"1\r\n \r\n")
                time.sleep(0.02)
        assert time.monotonic() - began_s < 9


@pytest.mark.parametrize("half", [b"", b"GET /health HTTP/1.1\r\nx-half: 1", HEAD + b"content-length: 9\r\n\r\n{"])
def test_clients_without_a_whole_request_make_room_for_others(engine: ScriptedEngine, half: bytes) -> None:
    """Half-sent requests cannot keep others out, long before their time is over."""
    limits = ConnectionLimits(max_connections=20, header_timeout_s=60)
    with contextlib.ExitStack() as stack:
        url, state = stack.enter_context(served(engine, connections=limits))
        for _ in range(100):
            with contextlib.suppress(ConnectionError):
                stack.enter_context(connected(url)).sendall(half)
        for _ in range(5):
            assert httpx.get(f"{url}/health", **PLAIN).status_code == 200
        assert state.is_serving


def test_beyond_the_most_connections_with_requests_the_answer_is_a_503(engine: ScriptedEngine) -> None:
    """Requests under way are not given up for one that comes."""
    engine.script.reply = saying("yes")
    engine.script.is_stalled = True
    with contextlib.ExitStack() as stack:
        url, _ = stack.enter_context(served(engine, connections=ConnectionLimits(max_connections=3)))
        busy = [stack.enter_context(connected(url)) for _ in range(3)]
        for sock in busy:
            sock.sendall(HEAD + b'content-length: 13\r\n\r\n{"text": "a"}')
        engine.wait_for(Generate, count=3)
        with connected(url) as late:
            answer = read_all(late)
        status, error = status_and_error(answer)
        assert (status, error["code"]) == (503, "too_many_connections")
        assert b"retry-after" in answer.lower()
        engine.script.is_stalled = False
        for sock in busy:
            assert b" 200 " in read_head(sock)


@pytest.mark.parametrize(("stall_s", "gets_all"), [(0.3, False), (60, True)])
def test_a_client_that_reads_nothing_does_not_stay(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, stall_s: float, gets_all: bool
) -> None:
    """It would keep its connection, and its stream, for as long as it likes."""
    monkeypatch.setattr(connection, "WRITE_STALL_S", stall_s)
    is_lost, lose = threading.Event(), Connection.connection_lost

    def connection_lost(self: Connection, error: Exception | None) -> None:
        lose(self, error)
        is_lost.set()

    monkeypatch.setattr(Connection, "connection_lost", connection_lost)
    with served(engine) as (url, _), connected(url) as sock:
        sock.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: localhost\r\n\r\n" * 15)
        sock.sendall(b"GET /docs/x HTTP/1.1\r\nconnection: close\r\n\r\n")
        assert is_lost.wait(1.5 if gets_all else 30) is not gets_all
        assert (b"HTTP/1.1 404" in read_all(sock)) is gets_all


def test_many_requests_in_one_piece_are_bounded(engine: ScriptedEngine) -> None:
    with served(engine) as (url, _), connected(url) as sock:
        sock.sendall(b"GET /ready HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2000)
        assert read_all(sock).count(b"HTTP/1.1 200") <= connection.MAX_PIPELINED + 1
        assert httpx.get(f"{url}/health", **PLAIN).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_a_400_without_a_traceback(
    engine: ScriptedEngine, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), served(engine) as (url, _), connected(url) as sock:
        sock.sendall(sent)
        assert status_and_error(read_all(sock))[0] == 400
    assert not caplog.records


def test_a_request_that_offers_http2_keeps_its_body(engine: ScriptedEngine) -> None:
    """Java's client offers an upgrade with its first request."""
    engine.script.reply = saying("yes")
    body = b'{"text": "a"}'
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    with served(engine) as (url, _), connected(url) as sock:
        sock.sendall(HEAD + offer + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert b" 200 " in read_head(sock)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/flush_cache", "/pause_generation", "/nowhere"])
def test_a_client_that_leaves_within_its_body_is_no_error(
    engine: ScriptedEngine, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = HEAD.replace(b"/generate", path.encode())
    with caplog.at_level(logging.WARNING), served(engine) as (url, _):
        for framing in (b"content-length: 100\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"):
            with connected(url) as sock:
                sock.sendall(head + framing)
        time.sleep(0.2)
        assert httpx.get(f"{url}/health", **PLAIN).status_code == 200
    assert not caplog.records, caplog.text


@pytest.mark.parametrize(
    "line",
    [
        b"authorization: Bearer \xff\xfe",
        b"authorization: " + b"Bearer " * 2000,
        b"x-request-id: \xff\xfe\x80" + b"a" * 5000,
        b"accept: \xff, application/json;q=x, ,,",
        b"content-type: \xff/json; charset=\xff",
        b"content-type: application/json; charset=utf-16",
        b"content-type: application/" + b"a" * 5000 + b"+json",
        b"origin: \xff://\xff:99999999",
        b"host: \xff:\xff",
        b"host: [::1",
        b"referer: http://[",
        b"sec-fetch-site: \xff",
        b"content-encoding: \xff",
        b"expect: \xff",
        b"cookie: " + b"a=b;" * 5000,
        b"connection: \xff, close",
        b"last-event-id: \xff",
    ],
)
def test_no_header_is_a_500(engine: ScriptedEngine, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), served(engine, api_key="key") as (url, _):
        for request in (b"GET /health", b"GET /v1/models", b"POST /generate", b"POST /flush_cache", b"OPTIONS /docs"):
            with connected(url) as sock:
                body = b"content-length: 2\r\n\r\n{}" if request.startswith(b"POST") else b"\r\n"
                key = b"" if b"authorization" in line else b"authorization: Bearer key\r\n"
                sock.sendall(request + b" HTTP/1.1\r\nconnection: close\r\n" + key + line + b"\r\n" + body)
                status = int(read_all(sock).split()[1])
                assert status < 500, (request, status)
    assert not [record for record in caplog.records if record.exc_info], caplog.text
