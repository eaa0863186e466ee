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
from headwater.fleet.models import ModelsFront
from headwater.fleet.replica import Beat, FromFront
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

    def __init__(self, models: bytes, *replicas: Any) -> None:
        """`models`: `FleetArgs` by name. `replicas`: the handle of each model's deployment, in the same order.

        Serve starts these deployments because they are bound here.
        """
        args = msgspec.json.decode(models, type=dict[str, FleetArgs])
        self._connections = Connections()
        self._models = {
            name: _Model(args[name], name, handle, self._connections, is_alone=len(args) == 1)
            for name, handle in zip(args, replicas, strict=True)
        }
        fronts = {name: model.front for name, model in self._models.items()}
        first = next(iter(self._models.values()))
        self._app = first.front if len(fronts) == 1 else ModelsFront(fronts, first.server)

    def __serve_build_asgi_app__(self) -> Front | ModelsFront:
        return self._app

    async def take_beat(self, encoded: bytes, actor: Any) -> bytes:
        """A replica announces itself; what it repeats in its next beat (`FromFront`)."""
        beat = _decode_beat(encoded)
        return msgspec.json.encode(await self._models[beat.model].take_beat(beat, actor))

    async def __del__(self) -> None:
        """Ray calls and awaits it before it ends the actor in order: the application ends, or is deployed anew."""
        for model in getattr(self, "_models", {}).values():
            await model.forget()

    async def num_running(self, name: str) -> int:
        """Requests that this front has sent to the replica `name`, and that have not ended."""
        replicas = [each for model in self._models.values() for each in model.front.client.replicas.values()]
        return sum(each.num_running for each in replicas if each.beat.name == name)

    async def check_health(self) -> None:
        for model in self._models.values():
            model.check()


class _Model:
    """One model of the fleet: its front, and what that needs of Ray."""

    def __init__(
        self, args: FleetArgs, name: str, replicas: Any, connections: Connections, *, is_alone: bool
    ) -> None:
        self._args = args
        self._actors: dict[str, Any] = {}
        server = with_model(args.server)  # each machine fetches what it lacks
        if not args.is_local:  # Serve's proxy listens, and names of hosts are the cluster's
            server = msgspec.structs.replace(server, host="0.0.0.0")
        self.server = server
        self.front = Front(
            server,
            post=connections.post,
            forward=connections.forward,
            is_dead=self._is_dead,
            scale=self._scale,
            limits=args.limits,
            keep=self._keep,
            is_guarded=is_alone,
            shares_files=args.is_local,
        )
        self._kept = RayInternalKVStore("headwater")
        self._replicas = replicas.deployment_id
        self._key = f"desired-{self._replicas.app_name}{'-' if name else ''}{name}"
        self._starting: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._scaling: asyncio.Task[None] | None = None

    async def take_beat(self, beat: Beat, actor: Any) -> FromFront:
        self._actors[beat.name] = actor
        if beat.has_ended:
            del self._actors[beat.name]
        self._starting = self._starting or asyncio.create_task(self._adopt())
        await asyncio.shield(self._starting)
        if self._loading is None:
            self._loading = asyncio.create_task(self.front.load())
            self._scaling = asyncio.create_task(self.front.scaling.run())
        return self.front.client.take_beat(beat)

    def check(self) -> None:
        """Raises what has ended one of its tasks."""
        for task in (self._loading, self._scaling):
            if task is not None and task.done():
                task.result()

    async def forget(self) -> None:
        """The application ends in order."""
        await asyncio.to_thread(self._kept.delete, self._key)

    async def _adopt(self) -> None:
        """What an earlier front of this application has decided, also if no replica has heard of it."""
        try:
            kept = await asyncio.to_thread(self._kept.get, self._key)
        except KVStoreError as error:
            log.warning("the state that an earlier front has kept cannot be read: %s", error)
            return
        if kept:
            self.front.client.adopt(kept.decode())

    async def _keep(self, desired: str) -> None:
        try:
            await asyncio.to_thread(self._kept.put, self._key, desired.encode())
        except KVStoreError as error:
            raise OSError(f"Ray does not take it: {error}") from None

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
