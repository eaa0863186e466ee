"""Two models in one fleet: simulated replicas behind the real applications of their fronts."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from fronts import FleetWithFront
from replicas import SimulatedReplica

from headwater.fleet.models import ModelsFront
from headwater.fleet.proxy import Answer


class EchoingReplicas(FleetWithFront):
    """A fleet of one model, whose replicas answer requests with what reached them."""

    def __init__(self, model: str, *replicas: SimulatedReplica) -> None:
        super().__init__(*replicas)
        self.model = model
        self.is_guarded = False

    @asynccontextmanager
    async def _forward(self, method: str, url: str, *, headers: Any, body: bytes) -> AsyncIterator[Answer]:
        self.asked.append(url)
        yield _Echo(self.model, url, body)


class _Echo:
    status = 200

    def __init__(self, model: str, url: str, body: bytes) -> None:
        path = url.removeprefix("http://").partition("/")[2].partition("?")[0]
        facts: dict[str, Any] = {"model": model, "body": body.decode(), "id": f"resp_{model[0]}1"}
        if path in ("v1/models", "api/tags"):
            facts = {"object": "list", "data" if path == "v1/models" else "models": [{"id": model}]}
        self._body = json.dumps(facts).encode()
        self.headers = [(b"content-type", b"application/json")]

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._body


class TwoModels:
    """`ab` with the replicas a and b, and `cd` with c and d."""

    def __init__(self) -> None:
        names = {"ab": ("a", "b"), "cd": ("c", "d")}
        self.fleets = {
            model: EchoingReplicas(model, *(SimulatedReplica(name) for name in replicas))
            for model, replicas in names.items()
        }
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "TwoModels":
        for fleet in self.fleets.values():
            await self._stack.enter_async_context(fleet)
            fleet.set_ready()
        fronts = {model: fleet.front for model, fleet in self.fleets.items()}
        transport = httpx.ASGITransport(ModelsFront(fronts, self.fleets["ab"].args))  # type: ignore[arg-type]
        client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
        self.http = await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
