"""NVIDIA Dynamo's frontend, with its KV router, in front of two workers whose engines are Headwater servers."""

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from checks import Server, call, check, run_checks
from gateways.gateway import free_ports, num_cached, num_served

MODEL = "headwater"
START_LIMIT_S = 120.0
LONG = "The sky is blue, and the sea is deep. " * 20
WORKER = Path(__file__).with_name("dynamo_worker.py")


class Dynamo:
    """The frontend and its workers. Discovery is a folder of this run, events go over zmq: no etcd, no NATS."""

    def __init__(self) -> None:
        self.servers = [os.environ["HEADWATER_URL"], os.environ["HEADWATER_SECOND_URL"]]
        (port,) = free_ports(1)
        systems = [low_port(22_000), low_port(27_000)]
        self.url = f"http://127.0.0.1:{port}"
        self.systems = [f"http://127.0.0.1:{each}" for each in systems]
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._start(
            "frontend", "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port),
            "--router-mode", "kv", "--kv-cache-block-size", "16", "--discovery-backend", "file",
            "--event-plane", "zmq",
        )  # fmt: skip
        for number, (server, system) in enumerate(zip(self.servers, systems, strict=True)):
            self._start(
                f"worker-{number}", str(WORKER), "--url", server, "--model-path", os.environ["HEADWATER_TOKENIZER"],
                "--model-name", MODEL, "--discovery-backend", "file", "--event-plane", "zmq",
                system_port=system,
            )  # fmt: skip

    def _start(self, name: str, *command: str, system_port: int | None = None) -> None:
        variables = {"DYN_FILE_KV": str(Path("discovery").absolute()), "DYN_SYSTEM_HOST": "127.0.0.1"}
        if system_port is not None:
            variables |= {"DYN_SYSTEM_PORT": str(system_port)}
        with open(f"{name}.log", "wb") as log:
            process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=os.environ | variables)
        self._processes.append((name, process))
        atexit.register(process.kill)

    def wait_serving(self) -> None:
        """Wait until both workers are found and a request gets through."""
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            try:
                if len(self._workers()) == 2 and self.chat("Hi", max_tokens=1).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            for name, process in self._processes:
                assert process.poll() is None, f"{name}: {Path(f'{name}.log').read_text()[-600:]}"
            assert time.monotonic() < deadline_s, self.end_of_logs()
            time.sleep(0.5)

    def _workers(self) -> list[str]:
        """The workers' system servers that are ready."""
        return [url for url in self.systems if httpx.get(f"{url}/health", trust_env=False).status_code == 200]

    def end_of_logs(self) -> str:
        return "\n".join(f"{name}: {Path(f'{name}.log').read_text()[-300:]}" for name, _ in self._processes)

    def chat(self, text: str, **more: object) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body | more, timeout=60, trust_env=False)

    def control(self, number: int, name: str, body: object) -> Any:
        url = f"{self.systems[number]}/engine/control/{name}"
        answer = httpx.post(url, json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        return answer.json()


def declare(dynamo: Dynamo) -> None:
    @check("starts")
    def starts(server: Server) -> None:
        dynamo.wait_serving()

    @check("chat")
    def chat(server: Server) -> None:
        answer = dynamo.chat("Why is the sky blue?")
        assert answer.status_code == 200, answer.text
        body = {"model": server.model, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
        direct = call(server.url, "/v1/chat/completions", body | {"temperature": 0, "max_tokens": 12})
        assert answer.json()["choices"][0]["message"]["content"] == direct["choices"][0]["message"]["content"]
        assert answer.json()["usage"]["completion_tokens"] == 12

    @check("stream")
    def stream(server: Server) -> None:
        lines = [line for line in dynamo.chat("Count to ten.", stream=True).text.splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
        assert text == dynamo.chat("Count to ten.").json()["choices"][0]["message"]["content"]

    @check("stop string")
    def stop_string(server: Server) -> None:
        whole = dynamo.chat("Why is the sky blue?").json()["choices"][0]["message"]["content"]
        word = whole.split()[3]
        cut = dynamo.chat("Why is the sky blue?", stop=[word]).json()["choices"][0]
        assert cut["finish_reason"] == "stop"
        assert word not in cut["message"]["content"]

    @check("errors")
    def errors(server: Server) -> None:
        assert dynamo.chat("Hi", max_tokens=10**7).status_code >= 400 or dynamo.chat("Hi", n=0).status_code >= 400
        answer = dynamo.chat("long " * 20_000)
        assert 400 <= answer.status_code < 500, f"{answer.status_code} {answer.text[:200]}"

    @check("a client that leaves ends its request")
    def leaves(server: Server) -> None:
        try:
            dynamo_body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell a story."}], "stream": True}
            dynamo_body |= {"max_tokens": 1500, "nvext": {"ignore_eos": True}}
            with httpx.stream(
                "POST", f"{dynamo.url}/v1/chat/completions", json=dynamo_body, timeout=30, trust_env=False
            ) as answer:
                next(answer.iter_lines())
        finally:
            deadline_s = time.monotonic() + 20
            while sum(num_running(url) for url in dynamo.servers):
                assert time.monotonic() < deadline_s, "the request still runs"
                time.sleep(0.2)

    @check("events of a server bring requests to it")
    def routing(server: Server) -> None:
        """Each server computes a prompt that Dynamo has not sent it, so Dynamo knows of it by events alone."""
        for turn in range(3):
            for number, url in enumerate(dynamo.servers):
                text = f"Group {turn} of server {number}. {LONG}"
                messages = [{"role": "user", "content": text}]
                call(url, "/v1/chat/completions", {"model": server.model, "messages": messages, "max_tokens": 1})
                time.sleep(1.0)  # the events are on their way
                before = num_served(url)
                usage = dynamo.chat(text, max_tokens=1).json()["usage"]
                assert num_served(url) > before, f"turn {turn}: the request went to the other server"
                assert usage["prompt_tokens_details"]["cached_tokens"] > 100, usage

    @check("spreads over both servers")
    def spread(server: Server) -> None:
        before = [num_served(url) for url in dynamo.servers]
        with ThreadPoolExecutor(8) as threads:
            assert {each.status_code for each in threads.map(lambda n: dynamo.chat(f"{n} " * 60), range(16))} == {200}
        assert all(num_served(url) > old for url, old in zip(dynamo.servers, before, strict=True))

    @check("flush of each worker")
    def flush(server: Server) -> None:
        """Dynamo has no flush of all workers: each worker's system server takes the call."""
        assert all(num_cached(url) for url in dynamo.servers)
        for number, url in enumerate(dynamo.servers):
            facts = dynamo.control(number, "flush_cache", {"mode": "now", "timeout": 5})
            assert facts["status"] == "ok", facts
            assert facts["answer"]["success"], facts
            assert num_cached(url) == 0

    @check("a flush that is refused says so inside a 200")
    def refused(server: Server) -> None:
        facts = dynamo.control(0, "flush_cache", {"mode": "sometimes"})
        assert (facts["status"], facts["status_code"]) == ("error", 400), facts

    @check("after a flush nothing is found, and routing goes on")
    def after(server: Server) -> None:
        usage = dynamo.chat(f"Group 0. {LONG}", max_tokens=1).json()["usage"]
        assert ((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0) == 0, usage


def low_port(first: int) -> int:
    """A free port below 32,768: Dynamo reads the port of a system server as a signed 16-bit number."""
    for port in range(first, first + 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


def num_running(url: str) -> int:
    return sum(each["num_running_reqs"] for each in call(url, "/server_info")["internal_states"])


if __name__ == "__main__":
    declare(Dynamo())
    run_checks()
