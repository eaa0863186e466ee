#!/usr/bin/env python3
"""Ray Serve LLM's own ingress in front of two models on `HeadwaterServer`; the record is kept.

    pip install '.[ray]' 'ray[serve]==2.60.0' 'fastapi<0.137' torch transformers triton openai pillow pybase64
    pip install orjson ipython pyarrow python-multipart httpx
    pip install --no-deps sglang==0.5.23 ai-dynamo-runtime==1.6.1
    PYTHONPATH=integrations python integrations/gateways/ray_serve_llm.py [CHECK...]

It needs an environment of its own: Ray, Headwater, SGLang for its models of requests alone, and Dynamo's index, which
Ray's router by cache events uses. Both models are the default model, under two names.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported
import ray
from ray import serve
from ray.llm._internal.serve.core.ingress.dev_ingress import build_dev_openai_app

from checks import REPORT_VARIABLE, URL_VARIABLES, Server, call, check, refused, run_checks
from gateways import ray_routers
from gateways.gateway import free_ports
from gateways.ray_routers import GROWING, MODEL, config, num_cached
from record import record_of, save

NAME = "ray-serve-llm"
REPLICAS = 2
LONG = "The sky is blue. " * 30


def main() -> None:
    (port,) = free_ports(1)
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(), name=ray_routers.APPLICATION)
        checks = outcomes(f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()
    versions = {name: version(name) for name in ("ray", "fastapi", "sglang", "ai-dynamo-runtime")}
    if not sys.argv[1:]:
        save(record_of(NAME, versions=versions, checks=checks))
    sys.exit(any(one["result"] == "failed" for one in checks))


def application() -> serve.Application:
    """Two replicas behind Ray's default router; and a model that grows, behind its router by prefixes."""
    configs = [config(MODEL, num_replicas=REPLICAS), ray_routers.growing_config()]
    return build_dev_openai_app({"llm_configs": configs})


def outcomes(url: str) -> list[dict[str, Any]]:
    """What each check found, as run_checks reports it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        os.environ |= {URL_VARIABLES["model"]: url, REPORT_VARIABLE: str(report)}
        run_checks()
        return [json.loads(line) for line in report.read_text().splitlines()]


def chat(server: Server, **more: object) -> Any:
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    body = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": 16}
    return call(server.url, "/v1/chat/completions", body | more)


@check("chat")
def answers(server: Server) -> None:
    answer = chat(server)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["message"]["content"].strip()


@check("stream")
def stream(server: Server) -> None:
    lines = [line for line in chat(server, stream=True).splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
    assert len(deltas) > 8
    assert "".join(deltas) == chat(server)["choices"][0]["message"]["content"]


@check("errors")
def errors(server: Server) -> None:
    error = refused(HTTPError, chat, server, top_p=2)
    assert error.code == 400
    assert "top_p" in error.read().decode()


@check("tokenize")
def tokenize(server: Server) -> None:
    found = call(server.url, "/tokenize", {"model": server.model, "prompt": "The sky is blue."})
    assert found["count"] == len(found["tokens"]) > 0
    back = call(server.url, "/detokenize", {"model": server.model, "tokens": found["tokens"]})
    assert back["text"].endswith("The sky is blue.")


@check("flush")
def flush(server: Server) -> None:
    """Ray sends it to both replicas; its router may send each request to either."""
    for turn in range(6):
        prompt = f"{turn} {LONG}"
        for _ in range(8):
            num_cached(server, prompt)
        assert num_cached(server, prompt) > 0
        call(server.url, "/reset_prefix_cache", {"model": server.model})
        assert num_cached(server, prompt) == 0


@check("pause")
def pause(server: Server) -> None:
    call(server.url, "/pause", {"model": server.model, "options": {"mode": "retract"}})
    path = f"/is_paused?model={server.model}"
    assert call(server.url, path)["is_paused"] is True
    call(server.url, "/resume", {"model": server.model})
    assert call(server.url, path)["is_paused"] is False
    assert chat(server)["usage"]["completion_tokens"] == 16


@check("models")
def models(server: Server) -> None:
    """Each request and each call concerns the model that it names, and no other."""
    assert [each["id"] for each in call(server.url, "/v1/models")["data"]] == [MODEL, GROWING]
    assert [chat(server, model=name)["model"] for name in (MODEL, GROWING)] == [MODEL, GROWING]
    assert refused(HTTPError, chat, server, model="another").code == 404
    other = Server(server.url, GROWING)
    assert num_cached(other, LONG) == 0
    for _ in range(8):
        num_cached(server, LONG)
    assert num_cached(other, LONG) > 0
    call(server.url, "/reset_prefix_cache", {"model": MODEL})
    assert num_cached(server, LONG) == 0
    assert num_cached(other, LONG) > 0
    call(server.url, "/pause", {"model": MODEL, "options": {"mode": "retract"}})
    try:
        assert call(server.url, f"/is_paused?model={GROWING}")["is_paused"] is False
        assert chat(other)["usage"]["completion_tokens"] == 16
    finally:
        call(server.url, "/resume", {"model": MODEL})


ray_routers.declare_checks()

if __name__ == "__main__":
    main()
