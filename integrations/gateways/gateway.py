"""A gateway in front of two servers: started by the script that checks it, and the checks that both gateways share."""

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from checks import Server, call, check, skip

START_LIMIT_S = 60.0


class Gateway:
    """The gateway's process. `{port}` and `{metrics}` in the command are free ports."""

    def __init__(self, *command: str) -> None:
        port, metrics = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        self.workers = [os.environ["HEADWATER_URL"], os.environ["HEADWATER_SECOND_URL"]]
        filled = [part.replace("{port}", str(port)).replace("{metrics}", str(metrics)) for part in command]
        self.log = open("gateway.log", "w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen([*filled, "--worker-urls", *self.workers], stdout=self.log, stderr=self.log)
        atexit.register(self.process.kill)

    def wait_serving(self, model: str) -> None:
        """Wait until a request gets through; a gateway is healthy before it has found its workers' models."""
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            try:
                if self.post("/v1/completions", {"model": model, "prompt": "Hi", "max_tokens": 1}).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.end_of_log()
            assert time.monotonic() < deadline_s, self.end_of_log()
            time.sleep(0.5)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, trust_env=False)

    def end_of_log(self) -> str:
        self.log.seek(0)
        return self.log.read()[-600:]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def num_served(url: str) -> int:
    """Prompt tokens that a server has taken since it started."""
    lines = str(call(url, "/metrics")).splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("sglang:prompt_tokens_total")))


def num_cached(url: str) -> int:
    return call(url, "/cache")["tiers"]["device"]["cached_pages"]


def declare_checks(gateway: Gateway) -> None:
    """The checks of every gateway: native and OpenAI's routes, streams, spread, flush."""

    def chat_body(server: Server, **more: object) -> dict:
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        return {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": 16} | more

    @check("starts")
    def starts(server: Server) -> None:
        gateway.wait_serving(server.model)

    @check("generate")
    def generate(server: Server) -> None:
        body = {"text": "The sky is", "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
        answer = gateway.post("/generate", body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"] == call(server.url, "/generate", body)["text"]

    @check("chat")
    def chat(server: Server) -> None:
        answer = gateway.post("/v1/chat/completions", chat_body(server))
        assert answer.status_code == 200, answer.text
        direct = call(server.url, "/v1/chat/completions", chat_body(server))
        assert answer.json()["choices"][0]["message"]["content"] == direct["choices"][0]["message"]["content"]

    @check("stream")
    def stream(server: Server) -> None:
        lines = gateway.post("/v1/chat/completions", chat_body(server, stream=True)).text.splitlines()
        assert [line for line in lines if line][-1] == "data: [DONE]"

    @check("completions")
    def completions(server: Server) -> None:
        answer = gateway.post("/v1/completions", {"model": server.model, "prompt": "1, 2, 3,", "max_tokens": 4})
        assert answer.status_code == 200, answer.text

    @check("json_schema")
    def json_schema(server: Server) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
        schema |= {"additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
        answer = gateway.post("/v1/chat/completions", chat_body(server, response_format=form, max_tokens=60))
        assert answer.status_code == 200, answer.text
        assert json.loads(answer.json()["choices"][0]["message"]["content"])["a"] in (True, False)

    @check("errors")
    def errors(server: Server) -> None:
        answer = gateway.post("/v1/chat/completions", chat_body(server, top_p=2))
        assert answer.status_code == 400, answer.text
        assert "top_p" in answer.text

    @check("spreads over both servers")
    def spread(server: Server) -> None:
        """Requests at the same time, since a gateway sends one after another to the same idle server."""

        def ask(number: int) -> int:
            body = {"text": f"{number} " * 40, "sampling_params": {"max_new_tokens": 16, "ignore_eos": True}}
            return gateway.post("/generate", body).status_code

        before = [num_served(url) for url in gateway.workers]
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(ask, range(24))) == {200}
        grown = [num_served(url) - old for url, old in zip(gateway.workers, before, strict=True)]
        assert all(grown), grown

    @check("flush")
    def flush(server: Server) -> None:
        """One call flushes both servers."""
        for url in gateway.workers:
            call(url, "/generate", {"text": "The sky is blue. " * 20, "sampling_params": {"max_new_tokens": 1}})
        assert all(num_cached(url) for url in gateway.workers)
        answer = gateway.post("/flush_cache", None)
        if answer.status_code in (404, 405):
            skip(f"the gateway has no such route ({answer.status_code})")
        assert answer.status_code == 200, answer.text
        assert [num_cached(url) for url in gateway.workers] == [0, 0]

    @check("health")
    def health(server: Server) -> None:
        assert gateway.get("/health").status_code == 200
        assert gateway.get("/v1/models").status_code == 200


def python_module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)
