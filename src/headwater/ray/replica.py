"""One replica of a fleet as a Ray Serve deployment: a Headwater server in processes of its own."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# types are checked where Ray is not installed

import asyncio
import logging
import uuid

import msgspec
import ray
from ray import serve

from headwater.fleet.replica import Beat, FromFront
from headwater.ray.fleet_args import FleetArgs
from headwater.ray.local_server import POLL_S, LocalServer

BEAT_S = 1.0
_ANSWER_S = 5.0  # of the front
_MAX_TOLD = 3  # a busy front may answer late
_STOP_S = 1.0  # before the end of the time to drain
_COPIES_S = 30.0  # for pages on their way to the host and the store, after the last request
log = logging.getLogger(__name__)


class ReplicaDeployment:
    """Starts the server, announces it, and ends it when its requests have ended."""

    async def __init__(self, args: bytes, front: str, model: str) -> None:
        """`front`: the name of its deployment. `model`: the name under which the front knows the model."""
        self._args = msgspec.json.decode(args, type=FleetArgs)
        context = serve.get_replica_context()
        self._front = serve.get_deployment_handle(front, app_name=context.app_name)
        self._actor = ray.get_runtime_context().current_actor
        host = "127.0.0.1" if self._args.is_local else ray.util.get_node_ip_address()
        self._server = await LocalServer.start(self._args.server, host=host, is_fleet_replica=True)
        self._beat = Beat(
            name=f"{context.replica_tag}-{uuid.uuid4().hex[:8]}",
            url=self._server.url,
            admin_key=self._server.admin_key,
            model=model,
            pid=self._server.pid,
            node=host,
        )
        self._beating = asyncio.create_task(self._announce())

    async def check_health(self) -> None:
        """Ray replaces a replica whose server has ended; the new one is another replica to the front."""
        self._server.require()

    async def __del__(self) -> None:
        """Ray calls and awaits it before it ends the actor."""
        if not hasattr(self, "_beating"):
            return
        self._beating.cancel()
        if not self._server.has_ended:
            try:
                async with asyncio.timeout(self._args.drain_s):
                    await self._drain()
            except TimeoutError:
                log.warning("requests still ran after %.0f s; they are ended", self._args.drain_s)
            except Exception as error:  # noqa: BLE001  # Ray's: the front has ended, and with it its requests
                log.warning("the front has ended: %s", error)
        await self._server.stop()
        await self._tell(msgspec.structs.replace(self._beat, has_ended=True))

    async def _announce(self) -> None:
        while True:
            said = await self._tell(self._beat)
            if said is not None:
                self._beat = msgspec.structs.replace(self._beat, front=said.front, desired=said.desired)
            await asyncio.sleep(BEAT_S)

    async def _tell(self, beat: Beat) -> FromFront | None:
        """The front's answer; None if it does not answer."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                answer = await self._front.take_beat.remote(msgspec.json.encode(beat), self._actor)
                return msgspec.json.decode(answer, type=FromFront)
        except Exception as error:  # noqa: BLE001  # Ray's, of many kinds: the front is not there
            log.debug("the front does not answer: %s", error)
            return None

    async def _drain(self) -> None:
        """Take no more requests, wait for those that run, and leave what is cached to the others."""
        drained_by_s = asyncio.get_running_loop().time() + self._args.drain_s
        for _ in range(_MAX_TOLD):
            if await self._tell(msgspec.structs.replace(self._beat, is_draining=True)) is not None:
                break
        else:
            return  # there is no front: the whole fleet ends
        while await self._front.num_running.remote(self._beat.name):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        if self._args.drain_persists and self._args.server.hicache_storage_backend is not None:
            left_s = max(0.0, drained_by_s - asyncio.get_running_loop().time() - _STOP_S)
            said = await self._server.persist(timeout_s=min(left_s, self._args.server.max_control_timeout))
            log.info("what is cached goes to the store: %s", said)
        for _ in range(round(_COPIES_S / POLL_S)):
            if await self._server.is_idle():
                break
            await asyncio.sleep(POLL_S)
