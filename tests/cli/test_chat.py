"""`headwater chat` against a scripted server: text arrives, refusals are sentences."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from headwater.cli import waiting_line
from headwater.cli.chat import reason_of
from headwater.cli.main import app


class Script(BaseHTTPRequestHandler):
    """Answers like a chat server: says the number of messages it was sent, in two pieces."""

    bodies: list[dict[str, Any]]
    refuse: tuple[int, str] | None
    break_off: bool
    num_loading: int  # so many questions for the models find the server loading
    delay_s: float  # before the answer begins
    engines: list[dict[str, Any]]

    def do_GET(self) -> None:
        if self.path == "/server_info":
            self._send(200, {"internal_states": self.engines})
        elif type(self).num_loading > 0:
            type(self).num_loading -= 1
            self._send(503, {"error": {"message": "the model is still loading", "code": "loading"}})
        else:
            self._send(200, {"data": [{"id": "some-model"}]})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(text)
        self.bodies.append(body)
        time.sleep(self.delay_s)
        if self.refuse:
            status, message = self.refuse
            self._send(status, {"error": {"message": message}})
            return
        chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant"}}]}]
        chunks += [{"choices": [{"delta": {"content": piece}}]} for piece in ("I got ", str(len(body["messages"])))]
        if self.break_off:
            chunks.append({"error": {"message": "the engine is gone"}})
        chunks.append({"choices": []})
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self._send(200, events)

    def _send(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def script() -> Iterator[type[Script]]:
    """A fresh handler class; its `url` is where it answers."""

    class Fresh(Script):
        bodies: list[dict[str, Any]] = []  # noqa: RUF012
        refuse = None
        break_off = False
        num_loading = 0
        delay_s = 0.0
        engines: list[dict[str, Any]] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    Fresh.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield Fresh
    server.shutdown()
    thread.join()
    server.server_close()


def run(*arguments: str, stdin: str = "") -> Any:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_one_question_prints_its_answer(script: Any) -> None:
    result = run("chat", "How many?", "--url", script.url, "--system", "Be brief.", "--max-tokens", "5")
    assert result.exit_code == 0
    assert result.stdout.strip() == "I got 2"
    body = script.bodies[0]
    assert body["model"] == "some-model"
    assert body["max_tokens"] == 5
    assert body["temperature"] == 0.3, "small models talk nonsense at the API's default of 1"
    assert run("chat", "How many?", "--url", script.url, "--temperature", "0").exit_code == 0
    assert script.bodies[-1]["temperature"] == 0
    assert "max_tokens" not in script.bodies[-1], "an option that was not given is left to the server"
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_conversation_remembers_and_resets(script: Any) -> None:
    result = run("chat", "--url", script.url, stdin="one\ntwo\n/reset\nthree\n/quit\nnever\n")
    assert result.exit_code == 0
    assert [len(body["messages"]) for body in script.bodies] == [1, 3, 1]
    assert script.bodies[1]["messages"][1] == {"role": "assistant", "content": "I got 1"}


def test_an_answer_that_broke_off_is_not_remembered(script: Any) -> None:
    script.break_off = True
    result = run("chat", "--url", script.url, stdin="one\ntwo\n")
    assert "the engine is gone" in result.output
    assert [len(body["messages"]) for body in script.bodies] == [1, 1]


def test_a_refusal_is_shown_in_the_servers_words(script: Any) -> None:
    script.refuse = (400, "max_tokens must be at least 1")
    result = run("chat", "hello", "--url", script.url)
    assert result.exit_code == 1
    assert "The server answered 400: max_tokens must be at least 1" in result.output


@pytest.mark.parametrize("options", [(), ("--model", "given")])
def test_a_server_that_loads_is_waited_for(script: Any, options: tuple[str, ...], monkeypatch: Any) -> None:
    """The first thing a newcomer does is to type the second command before the first has got ready."""
    monkeypatch.setattr(waiting_line, "WONDER_S", 0.0)
    monkeypatch.setattr("headwater.cli.chat.POLL_S", 0.05)
    script.num_loading = 3
    result = run("chat", "How many?", "--url", script.url, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "I got 1"
    assert script.num_loading == 0


def test_what_an_answer_waits_for_is_shown_and_not_in_the_answer(script: Any) -> None:
    script.engines = [{"dp_rank": 0, "paused": True, "num_running_reqs": 0, "num_waiting_reqs": 1}]
    script.delay_s = 2.0
    result = run("chat", "How many?", "--url", script.url)
    assert result.stdout.strip() == "I got 1"
    assert "(generation is paused; `headwater continue` ends the pause)" in result.stderr


@pytest.mark.parametrize(
    ("engines", "words"),
    [
        ([], "waiting for the first token"),
        ([{"num_running_reqs": 1}], "waiting for the first token"),
        ([{"num_running_reqs": 3, "num_waiting_reqs": 2}], "4 other requests"),
        ([{"paused": True}], "paused"),
        ([{"paused": True}, {"paused": False}], "first token"),
        ([{"released_memory": ["kv_cache"]}], "headwater memory resume"),
        ([{"released_memory": ["kv_cache"]}, {"paused": True}], "paused"),
    ],
)
def test_the_reason_is_what_holds_every_engine(engines: list[dict[str, Any]], words: str) -> None:
    assert words in reason_of(engines)


@pytest.mark.parametrize("command", [("chat", "hello"), ("flush",)])
def test_no_server_is_a_sentence_and_not_a_traceback(command: tuple[str, ...]) -> None:
    result = run(*command, "--url", "http://127.0.0.1:9")
    assert result.exit_code != 0
    assert "No server answers at http://127.0.0.1:9" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("url", ["nonsense", "http://[bad"])
def test_a_malformed_url_is_a_sentence_and_not_a_traceback(url: str) -> None:
    for command in (("chat", "hello"), ("flush",)):
        result = run(*command, "--url", url)
        assert result.exit_code in (1, 2)
        assert isinstance(result.exception, SystemExit), result.exception
