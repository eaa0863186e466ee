"""A simulated fleet behind the real application of a front."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import httpx
from replicas import SimulatedFleet

from headwater.fleet.client import FleetClient
from headwater.fleet.front import Front
from headwater.fleet.proxy import Answer, NotConnected
from headwater.launch.config import ServerArgs
from headwater.launch.facts_builder import build_model_facts

ADMIN = {"authorization": "Bearer boss", "accept": "application/json"}


class FleetWithFront(SimulatedFleet):
    """A simulated fleet behind the real application of a front."""

    model = "tiny"
    is_guarded = True
    shares_files = False
    arguments: Mapping[str, Any] = MappingProxyType({})  # of the servers
    error: Exception = NotConnected("refused")  # of requests

    def make_client(self) -> FleetClient:
        self.asked: list[str] = []
        self.wanted: list[int] = []
        args = ServerArgs(model="tiny", served_model_name=self.model, admin_api_key="boss", **self.arguments)
        self.front = Front(
            args,
            post=self.post,
            forward=self._forward,
            is_dead=self.is_dead,
            scale=self._scale,
            is_guarded=self.is_guarded,
            shares_files=self.shares_files,
        )
        self.args = args
        return self.front.client

    def set_ready(self) -> None:
        """As `Front.load` does, without the files of a model."""
        ready = next(each for each in self.client.ready if each is not None)
        tokenizer: Any = type("NoTokenizer", (), {"chat_template_source": lambda self, has_tools: ""})()
        self.front.state.set_ready(tokenizer=tokenizer, model=build_model_facts(self.args, ready))

    def http(self) -> httpx.AsyncClient:
        self.set_ready()
        transport = httpx.ASGITransport(self.front)  # type: ignore[arg-type]
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    async def _scale(self, replicas: int) -> None:
        self.wanted.append(replicas)

    @asynccontextmanager
    async def _forward(self, method: str, url: str, *, headers: Any, body: bytes) -> AsyncIterator[Answer]:
        self.asked.append(url)
        raise self.error
        yield
