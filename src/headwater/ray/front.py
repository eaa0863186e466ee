"""The front of a fleet as a Ray Serve deployment."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# types are checked where Ray is not installed

import asyncio
import logging
from typing import Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve._private.storage.kv_store import KVStoreError, RayInternalKVStore
from ray.serve.context import _get_global_client

from headwater.fleet.connections import Connections
from headwater.fleet.front import Front
from headwater.fleet.replica import Beat
from headwater.generation.errors import ApiError
from headwater.launch.model_choice import with_model
from headwater.ray.fleet_args import FleetArgs

_ANSWER_S = 2.0
_CONTROLLER_S = 10.0
_decode_beat = msgspec.json.Decoder(Beat).decode
log = logging.getLogger(__name__)


@serve.ingress()
class FrontDeployment:
    """One replica of it: whether a replica of the fleet may serve is decided in one place."""

    def __init__(self, args: bytes, replicas: Any) -> None:
        """`replicas`: the handle of their deployment, which Serve starts because it is bound here."""
        self._args = msgspec.json.decode(args, type=FleetArgs)
        self._connections = Connections()
        self._actors: dict[str, Any] = {}
        server = with_model(self._args.server)  # each machine fetches what it lacks
        if not self._args.is_local:  # Serve's proxy listens, and names of hosts are the cluster's
            server = msgspec.structs.replace(server, host="0.0.0.0")
        self._front = Front(
            server,
            post=self._connections.post,
            forward=self._connections.forward,
            is_dead=self._is_dead,
            scale=self._scale,
            limits=self._args.limits,
            keep=self._keep,
        )
        self._kept = RayInternalKVStore("headwater")
        self._key = f"desired-{replicas.deployment_id.app_name}"
        self._starting: asyncio.Task[None] | None = None
        self._replicas = replicas.deployment_id
        self._loading: asyncio.Task[None] | None = None
        self._scaling: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Front:
        return self._front

    async def take_beat(self, encoded: bytes, actor: Any) -> bytes:
        """A replica announces itself; what it repeats in its next beat (`FromFront`)."""
        beat = _decode_beat(encoded)
        self._actors[beat.name] = actor
        if beat.has_ended:
            del self._actors[beat.name]
        self._starting = self._starting or asyncio.create_task(self._adopt())
        await asyncio.shield(self._starting)
        if self._loading is None:
            self._loading = asyncio.create_task(self._front.load())
            self._scaling = asyncio.create_task(self._front.scaling.run())
        return msgspec.json.encode(self._front.client.take_beat(beat))

    async def _adopt(self) -> None:
        """What an earlier front of this application has decided, also if no replica has heard of it."""
        try:
            kept = await asyncio.to_thread(self._kept.get, self._key)
        except KVStoreError as error:
            log.warning("the state that an earlier front has kept cannot be read: %s", error)
            return
        if kept:
            self._front.client.adopt(kept.decode())

    async def _keep(self, desired: str) -> None:
        try:
            await asyncio.to_thread(self._kept.put, self._key, desired.encode())
        except KVStoreError as error:
            raise OSError(f"Ray does not take it: {error}") from None

    async def __del__(self) -> None:
        """Ray calls and awaits it before it ends the actor in order: the application ends, or is deployed anew."""
        if hasattr(self, "_kept"):
            await asyncio.to_thread(self._kept.delete, self._key)

    async def num_running(self, name: str) -> int:
        """Requests that this front has sent to the replica `name`, and that have not ended."""
        return sum(each.num_running for each in self._front.client.replicas.values() if each.beat.name == name)

    async def check_health(self) -> None:
        for task in (self._loading, self._scaling):
            if task is not None and task.done():
                task.result()

    async def _scale(self, replicas: int) -> None:
        """As Serve's own HTTP route for scaling does, which needs Ray's dashboard."""
        client: Any = _get_global_client()
        try:
            async with asyncio.timeout(_CONTROLLER_S):
                await client._controller.update_deployment_replicas.remote(self._replicas, replicas)
        except (RayError, TimeoutError) as error:
            raise ApiError(409, f"Ray Serve does not scale this fleet by command: {error}") from None

    async def _is_dead(self, name: str) -> bool:
        """Only if Ray knows it. A machine that merely cannot be reached may still hold pages."""
        actor = self._actors.get(name)
        if actor is None:
            return False
        try:
            async with asyncio.timeout(_ANSWER_S):
                await actor.__ray_ready__.remote()
        except RayActorError as error:
            if isinstance(error, ray.exceptions.ActorUnavailableError):
                return False
            del self._actors[name]
            return True
        except (TimeoutError, RayError):
            pass
        return False
