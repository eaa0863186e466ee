"""One replica of a fleet as a Ray Serve deployment: a Headwater server in processes of its own."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# types are checked where Ray is not installed

import asyncio
import logging
import secrets
import socket
import sys
import urllib.error
import urllib.request
import uuid
from typing import Any

import msgspec
import ray
from ray import serve

from headwater.fleet.replica import Beat, FromFront
from headwater.launch.config import ServerArgs
from headwater.ray.fleet_args import FleetArgs

BEAT_S = 1.0
_ANSWER_S = 5.0  # of the front
_POLL_S = 0.1
_COPIES_S = 30.0  # for pages on their way to the host and the store, after the last request
_STOP_S = 10.0
log = logging.getLogger(__name__)


class ReplicaDeployment:
    """Starts the server, announces it, and ends it when its requests have ended."""

    async def __init__(self, args: bytes, front: str) -> None:
        self._args = msgspec.json.decode(args, type=FleetArgs)
        context = serve.get_replica_context()
        self._front = serve.get_deployment_handle(front, app_name=context.app_name)
        self._actor = ray.get_runtime_context().current_actor
        host = "127.0.0.1" if self._args.is_local else ray.util.get_node_ip_address()
        key = self._args.server.admin_api_key or secrets.token_urlsafe(32)
        self._server = msgspec.structs.replace(
            self._args.server,
            host=host,
            port=_free_port(host),
            admin_api_key=key,
            fleet_replica=True,
            engine_restarts=0,
        )
        self._process = await _start(self._server)
        self._beat = Beat(
            name=f"{context.replica_tag}-{uuid.uuid4().hex[:8]}",
            url=f"http://{host}:{self._server.port}",
            admin_key=key,
            pid=self._process.pid,
            node=host,
        )
        while await asyncio.to_thread(self._status, "/health") != 200:
            self._require_process()
            await asyncio.sleep(_POLL_S)
        self._beating = asyncio.create_task(self._announce())

    async def check_health(self) -> None:
        """Ray replaces a replica whose server has ended; the new one is another replica to the front."""
        self._require_process()

    async def __del__(self) -> None:
        """Ray calls and awaits it before it ends the actor."""
        if not hasattr(self, "_beating"):
            return
        self._beating.cancel()
        if self._process.returncode is None:
            try:
                async with asyncio.timeout(self._args.drain_s):
                    await self._drain()
            except TimeoutError:
                log.warning("requests still ran after %.0f s; they are ended", self._args.drain_s)
        await self._stop()
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
        """Take no more requests, and wait for those that run, and for the copies of their pages."""
        if await self._tell(msgspec.structs.replace(self._beat, is_draining=True)) is None:
            return  # the whole fleet ends
        while await self._front.num_running.remote(self._beat.name):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        for _ in range(round(_COPIES_S / _POLL_S)):
            if await asyncio.to_thread(self._is_idle):
                break
            await asyncio.sleep(_POLL_S)

    async def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which ends the server in order
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _require_process(self) -> None:
        if self._process.returncode is not None:
            raise RuntimeError(f"the server has ended with exit code {self._process.returncode}")

    def _is_idle(self) -> bool:
        answer = self._get("/control/blockers")
        return answer is None or bool(msgspec.json.decode(answer)["is_idle"])

    def _status(self, path: str) -> int | None:
        try:
            return self._open(path).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def _get(self, path: str) -> bytes | None:
        try:
            return self._open(path).read()
        except OSError:
            return None

    def _open(self, path: str) -> Any:
        key = {"authorization": f"Bearer {self._server.admin_api_key}"}
        request = urllib.request.Request(f"http://{self._server.host}:{self._server.port}{path}", headers=key)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        return opener.open(request, timeout=_ANSWER_S)


async def _start(args: ServerArgs) -> asyncio.subprocess.Process:
    """The server's process, which ends when its standard input is closed: also if this process is killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "headwater.fleet.replica_process", stdin=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(args) + b"\n")
    await process.stdin.drain()
    return process


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
