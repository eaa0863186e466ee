"""Headwater under Ray Serve LLM: `LLMConfig(server_cls="headwater.ray.llm_server:HeadwaterServer", ...)`.

Ray Serve LLM brings the ingress, autoscaling and routers. Its models of requests come from vLLM or SGLang, so one of
them has to be importable there; Headwater uses only these models.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# types are checked where Ray is not installed

import copy
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from ray.util import get_node_ip_address

from headwater.fleet.connections import Connections
from headwater.ray.llm_config import routing_stats, server_args
from headwater.ray.local_server import LocalServer


class HeadwaterServer:
    """One replica: a server in processes of its own. `engine_kwargs` are the arguments of `headwater serve`.

    Ray Serve LLM sends control calls to all replicas and throws their answers away, but not their exceptions: so a
    call that was not carried out raises. Its ingress then answers 500 instead of 200.
    """

    async def __init__(self, llm_config: Any) -> None:
        self._llm_config = llm_config
        self._connections = Connections()
        await self.start()

    @classmethod
    def get_deployment_options(cls, llm_config: Any) -> dict[str, Any]:
        options = copy.deepcopy(llm_config.deployment_config)
        actor = options.setdefault("ray_actor_options", {})
        tp_size = int(llm_config.engine_kwargs.get("tp_size", 1))
        if llm_config.engine_kwargs.get("device") != "cpu":
            actor.setdefault("num_gpus", tp_size)
        if llm_config.runtime_env:
            actor.setdefault("runtime_env", {}).update(llm_config.runtime_env)
        return options

    async def start(self) -> None:
        self._server = await LocalServer.start(server_args(self._llm_config), host="127.0.0.1")
        sources = await self._control("/get_kv_event_sources", method="GET")
        info = await self._control("/server_info", method="GET") if sources else {}
        self._routing_stats = routing_stats(sources, info, host=get_node_ip_address()) if sources else {}

    async def __del__(self) -> None:
        if hasattr(self, "_server"):
            await self._server.stop()
            await self._connections.close()

    async def check_health(self) -> None:
        self._server.require()

    async def llm_config(self) -> Any:
        return self._llm_config

    async def record_routing_stats(self) -> dict[str, Any]:
        """Where this replica publishes the events of its cache, for Ray's KV-aware router; empty without events."""
        return self._routing_stats

    # --- requests ----------------------------------------------------------------------------------

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        async for part in self._answer("/v1/chat/completions", request, "ChatCompletionResponse"):
            yield part

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        async for part in self._answer("/v1/completions", request, "CompletionResponse"):
            yield part

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        async for part in self._answer("/v1/embeddings", request, "EmbeddingResponse"):
            yield part

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        async for part in self._answer("/tokenize", request, "TokenizeResponse"):
            yield part

    async def detokenize(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        async for part in self._answer("/detokenize", request, "DetokenizeResponse"):
            yield part

    async def _answer(self, path: str, request: Any, model: str) -> AsyncIterator[Any]:
        """The events of a stream as texts, or one answer as Ray's `model`; an error as its `ErrorResponse`."""
        from ray.llm._internal.serve.core.configs import openai_api_models

        body = msgspec.json.encode(request.model_dump(mode="json", exclude_unset=True))
        async with self._forward(path, body) as answer:
            if answer.status == 200 and getattr(request, "stream", False):
                async for event in _events(answer.chunks()):
                    yield event
                return
            facts = msgspec.json.decode(b"".join([chunk async for chunk in answer.chunks()]))
        yield getattr(openai_api_models, model)(**facts) if answer.status == 200 else _error(answer.status, facts)

    # --- control -----------------------------------------------------------------------------------

    async def reset_prefix_cache(self) -> None:
        """A flush at once, under load; running requests go on."""
        await self._control("/flush_cache?mode=now")

    async def pause(self, **options: Any) -> None:
        await self._control("/pause_generation", {"mode": options.get("mode", "abort")})

    async def resume(self, **options: Any) -> None:
        await self._control("/continue_generation")

    async def is_paused(self) -> bool:
        info = await self._control("/server_info", method="GET")
        return any(state["paused"] for state in info["internal_states"])

    async def sleep(self, **options: Any) -> None:
        await self._control("/release_memory_occupation", {"tags": options["tags"]} if options.get("tags") else {})

    async def wakeup(self, **options: Any) -> None:
        await self._control("/resume_memory_occupation", {"tags": options["tags"]} if options.get("tags") else {})

    async def is_sleeping(self) -> bool:
        info = await self._control("/server_info", method="GET")
        return any(state["released_memory"] for state in info["internal_states"])

    async def _control(self, path: str, body: Any = None, *, method: str = "POST") -> Any:
        """The answer. RuntimeError, with the server's reason, if it was not carried out whole."""
        sent = b"" if body is None else msgspec.json.encode(body)
        async with self._forward(path, sent, method=method) as answer:
            facts = msgspec.json.decode(b"".join([chunk async for chunk in answer.chunks()]))
        if answer.status != 200:
            raise RuntimeError(facts.get("message") or facts["error"]["message"])
        return facts

    def _forward(self, path: str, body: bytes, *, method: str = "POST") -> Any:
        headers = [
            (b"content-type", b"application/json"),
            (b"accept", b"application/json"),
            (b"authorization", f"Bearer {self._server.admin_key}".encode()),
        ]
        return self._connections.forward(method, f"{self._server.url}{path}", headers=headers, body=body)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Whole events, however the stream was cut."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n\n")
        for event in whole:
            yield event.decode() + "\n\n"


def _error(status: int, facts: Any) -> Any:
    from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

    error = facts["error"]
    return ErrorResponse(error=ErrorInfo(message=error["message"], type=error["type"], code=status))
