#!/usr/bin/env python3
"""A worker of NVIDIA Dynamo whose engine is a Headwater server, reached over HTTP.

    pip install ai-dynamo==1.6.1
    headwater serve --port 30000 --kv-events-endpoint tcp://127.0.0.1:5557
    python integrations/gateways/dynamo_worker.py --url http://127.0.0.1:30000 --model-path FOLDER

FOLDER has the tokenizer and the chat template as Hugging Face files: Dynamo tokenizes prompts and detokenizes answers.
Needs Dynamo's packages only; its events go from the server's socket to Dynamo's router.
"""

import argparse
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from dynamo._core import Context
from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.publisher import KvEventSource, ZmqSource
from dynamo.common.backend.run import run

# names of Dynamo and of Headwater's native route
SAMPLING = {
    name: name
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    )
} | {"seed": "sampling_seed"}
STOPPING = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "ignore_eos": "ignore_eos"}
CONTROLS = {  # of Dynamo: the server's route
    "flush_cache": "/flush_cache",
    "clear_kv_blocks": "/flush_cache",
    "pause_generation": "/pause_generation",
    "continue_generation": "/continue_generation",
    "release_memory_occupation": "/release_memory_occupation",
    "resume_memory_occupation": "/resume_memory_occupation",
    "update_weights_from_disk": "/update_weights_from_disk",
    "update_weight_version": "/update_weight_version",
}


class HeadwaterEngine(LLMEngine):
    """Forwards each request to the server. The server runs and ends by itself."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._url = args.url.rstrip("/")
        self._model_path = args.model_path
        self._name = args.model_name
        self._keeps_cache = args.keep_cache
        self._headers = {"Authorization": f"Bearer {args.admin_key}"} if args.admin_key else {}
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple["HeadwaterEngine", WorkerConfig]:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--url", required=True, help="the server")
        parser.add_argument("--admin-key", default="", help="of the server, for flushes and other controls")
        parser.add_argument("--model-path", required=True, help="folder with the tokenizer")
        parser.add_argument("--model-name", default="headwater")
        parser.add_argument(
            "--keep-cache",
            action="store_true",
            help="do not flush the server first. Dynamo's router does not learn what is cached before it listens, and "
            "then drops all that is computed on top of it",
        )
        parser.add_argument("--namespace", default="dynamo")
        parser.add_argument("--component", default="headwater")
        parser.add_argument("--endpoint", default="generate")
        parser.add_argument("--discovery-backend", default="etcd", help="etcd, kubernetes, file or mem")
        parser.add_argument("--event-plane", default=None, help="nats or zmq")
        args = parser.parse_args(argv)
        config = WorkerConfig(
            namespace=args.namespace,
            component=args.component,
            endpoint=args.endpoint,
            model_name=args.model_path,
            served_model_name=args.model_name,
            discovery_backend=args.discovery_backend,
            event_plane=args.event_plane,
            use_kv_events=True,
        )
        return cls(args), config

    async def start(self, worker_id: int) -> EngineConfig:
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=None))
        if not self._keeps_cache:
            facts = await self.engine_control("flush_cache", {"mode": "now", "timeout": 10})
            if facts["status"] != "ok":
                raise RuntimeError(f"the server was not flushed: {facts['answer']}")
        info = await self._get("/server_info")
        return EngineConfig(
            model=self._model_path,
            served_model_name=self._name,
            llm=LlmRegistration(
                context_length=info["max_model_len"],
                kv_cache_block_size=info["page_size"],
                total_kv_blocks=info["max_total_num_tokens"] // info["page_size"],
                max_num_seqs=info["internal_states"][0]["effective_max_running_requests_per_dp"],
            ),
        )

    async def generate(self, request: Any, context: Context) -> AsyncIterator[dict[str, Any]]:
        body = native_body(request, rid=context.id())
        async with self._post("/generate", body) as answer:
            if answer.status != 200:
                raise ValueError((await answer.json())["error"]["message"])
            num_sent = 0
            async for chunk in events(answer.content):
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                meta = chunk["meta_info"]
                new, num_sent = chunk["output_ids"][num_sent:], len(chunk["output_ids"])
                finish = meta.get("finish_reason")
                if finish is None:
                    yield {"token_ids": new, "index": 0}
                else:
                    yield {"token_ids": new, "index": 0} | ended(finish, meta)

    async def abort(self, context: Context) -> None:
        async with self._post("/abort_request", {"rid": context.id()}):
            pass

    async def kv_event_sources(self) -> list[KvEventSource]:
        sources = await self._get("/get_kv_event_sources")
        return [
            ZmqSource(endpoint=each["endpoint"], topic=each["topic"], dp_rank=each["data_parallel_rank"])
            for each in sources
        ]

    def supported_controls(self) -> set[str]:
        return set(CONTROLS)

    async def engine_control(self, control: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer, and its status: Dynamo answers 200 whatever is in it."""
        async with self._post(CONTROLS[control], body or {}, accept="application/json") as answer:
            facts = await answer.json()
        is_done = answer.status == 200 and facts.get("success", True)
        return {"status": "ok" if is_done else "error", "status_code": answer.status, "answer": facts}

    async def cleanup(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _get(self, path: str) -> Any:
        assert self._session is not None, "start first"
        async with self._session.get(self._url + path) as answer:
            answer.raise_for_status()
            return await answer.json()

    def _post(self, path: str, body: Any, *, accept: str = "*/*") -> Any:
        assert self._session is not None, "start first"
        return self._session.post(self._url + path, json=body, headers={"Accept": accept})


def native_body(request: Any, *, rid: str) -> dict[str, Any]:
    """Dynamo's request as `/generate` takes it. What Dynamo leaves out keeps the server's default."""
    sampling = request.get("sampling_options") or {}
    stopping = request.get("stop_conditions") or {}
    params = {ours: sampling[theirs] for theirs, ours in SAMPLING.items() if sampling.get(theirs) is not None}
    params |= {ours: stopping[theirs] for theirs, ours in STOPPING.items() if stopping.get(theirs) is not None}
    stop_ids = {*(stopping.get("stop_token_ids_hidden") or []), *(stopping.get("stop_token_ids") or [])}
    if stop_ids:
        params["stop_token_ids"] = sorted(stop_ids)
    return {"rid": rid, "input_ids": list(request["token_ids"]), "sampling_params": params, "stream": True}


def ended(finish: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """The last chunk's fields: why it ended, and what it took."""
    reasons = {"stop": "stop", "length": "length", "abort": "cancelled"}
    prompt, completion = meta["prompt_tokens"], meta["completion_tokens"]
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    usage["prompt_tokens_details"] = {"cached_tokens": meta.get("cached_tokens", 0)}
    return {"finish_reason": reasons.get(finish["type"], "error"), "completion_usage": usage}


async def events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event."""
    async for line in content:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


if __name__ == "__main__":
    run(HeadwaterEngine)
