"""Real processes that die, are told to stop, or cannot start: nothing hangs and nothing is left behind."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import RunningServer
from tiered import DEVICE, ask, write_byte_tokenizer

from processes import Stalls, is_alive

pytestmark = pytest.mark.slow

# a model that computes in no time, and an answer that is far from its end when something happens
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40_000,
    "eos_token_id": 2,
}
LONG = {"text": "1,2,3,", "sampling_params": {"max_new_tokens": 39_000, "ignore_eos": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments for a server with it."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_byte_tokenizer(folder)
    return ("--model", str(folder), "--load-format", "dummy", "--max-total-tokens", "80000")


class Background:
    """A long request in a thread; `events` and `status` tell how it went."""

    def __init__(self, server: RunningServer, *, stream: bool) -> None:
        self.status = 0
        self.events: list[str] = []
        self.error: Exception | None = None
        self.is_running = threading.Event()
        self._body: dict[str, Any] = {**LONG, "stream": stream}
        self._thread = threading.Thread(target=self._ask, args=(server.url,))
        self._thread.start()

    def _ask(self, url: str) -> None:
        try:
            with httpx.stream(
                "POST", url + "/generate", json=self._body, timeout=60, trust_env=False
            ) as answer:
                self.status = answer.status_code
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line)
                        self.is_running.set()
        except httpx.HTTPError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the request hangs"


def start_two(server: RunningServer) -> tuple[Background, Background]:
    """A stream and a plain request, both being generated."""
    stream, plain = Background(server, stream=True), Background(server, stream=False)
    assert stream.is_running.wait(60)
    deadline = time.monotonic() + 60
    while server.get("/v1/loads").json()["loads"][0]["num_running_reqs"] < 2:
        assert time.monotonic() < deadline, server.get("/v1/loads").text
    return stream, plain


def last_error(background: Background) -> dict[str, Any]:
    events = [event for event in background.events if event != "data: [DONE]"]
    return json.loads(events[-1].removeprefix("data:"))["error"]


def test_a_killed_engine_fails_its_requests_with_503_and_ends_the_server(model: tuple[str, ...]) -> None:
    """Its health is 503 between the engine's death and the exit."""
    with RunningServer(*model) as server:
        server.wait_healthy()
        stream, plain = start_two(server)
        os.kill(server.engine_pid(), signal.SIGKILL)
        seen = []
        with Stalls() as stalls:
            while (status := server.health()) is not None:
                seen.append(status)
                time.sleep(0.02)
        assert 503 in seen or stalls.lost_s > 0.5, "the server lingers for a second"
        plain.join()
        stream.join()
        assert plain.status == 503, plain.events
        assert "SIGKILL" in last_error(plain)["message"]
        assert stream.status == 200, "its headers were sent before"
        assert stream.error is None, "a stream must end with an event, not with a broken connection"
        assert last_error(stream)["code"] == 503 or "SIGKILL" in last_error(stream)["message"]
        assert server.wait_exit(60) not in (0, -signal.SIGKILL)
        assert "killed by SIGKILL" in server.log
        assert list(server.temporary.iterdir()) == []


def test_a_killed_engine_is_restarted_when_allowed(tiny_model: str) -> None:
    with RunningServer("--model", tiny_model, *DEVICE, "--engine-restarts", "1") as server:
        server.wait_healthy()
        before = ask(server, 0)
        first = server.engine_pid()
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (status := server.health()) == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert status == 503, "while the new engine loads"
        server.wait_healthy()
        assert server.engine_pid() != first
        after = ask(server, 0)
        assert after["output_ids"] == before["output_ids"]
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.wait_exit(60) != 0, "the second death is one too many"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_streams_properly_and_everything_within_five_seconds(
    model: tuple[str, ...], number: signal.Signals
) -> None:
    with RunningServer(*model) as server:
        server.wait_healthy()
        stream, plain = start_two(server)
        engine = server.engine_pid()
        before_s = time.monotonic()
        with Stalls() as stalls:
            server.process.send_signal(number)
            assert server.wait_exit(30) == 0, server.log
            took_s = time.monotonic() - before_s
        assert took_s < 5 + stalls.lost_s
        assert not is_alive(engine)
        assert list(server.temporary.iterdir()) == [], "sockets are left"
        stream.join()
        plain.join()
        assert stream.error is None, "a stream must end with an event, not with a broken connection"
        assert "shutting down" in last_error(stream)["message"]
        assert plain.status == 503
        assert "Traceback" not in server.log


def test_the_engine_and_its_sockets_go_when_the_server_is_killed(model: tuple[str, ...]) -> None:
    with RunningServer(*model) as server:
        server.wait_healthy()
        engine = server.engine_pid()
        server.process.kill()
        server.wait_exit(30)
        deadline = time.monotonic() + 60
        while is_alive(engine) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_alive(engine)
        assert list(server.temporary.iterdir()) == []


def test_health_is_503_while_the_model_loads_and_then_200() -> None:
    """With the default model, whose loading takes a while."""
    with RunningServer() as server:
        seen = set()
        while (status := server.health()) != 200:
            seen.add(status)
            assert server.process.poll() is None, server.log
            time.sleep(0.02)
        assert seen <= {None, 503}
        assert 503 in seen
        shown = server.log
        for path in ("/v1", "/docs", "/metrics"):
            assert server.url + path in shown


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "does not exist"),
        ({"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}, "NoSuchForCausalLM"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_clear_message(
    tmp_path: Path, config: dict[str, Any] | None, says: str
) -> None:
    folder = tmp_path / "model"
    if config is not None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        write_byte_tokenizer(folder)  # without any, the server imports transformers, which takes seconds
    with RunningServer("--model", str(folder)) as server:
        assert server.wait_exit(60) == 2
        assert says in server.log
        assert "Traceback" not in server.log
        assert server.log.count("error:") == 1


def test_a_taken_port_is_one_clear_message() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with RunningServer("--port", str(port)) as server:  # the last --port counts
            assert server.wait_exit(60) == 2
            assert f"port {port}" in server.log
            assert "Traceback" not in server.log
