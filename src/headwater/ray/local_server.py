"""A Headwater server in processes of its own, which ends with the process that started it. No Ray here."""

import asyncio
import secrets
import socket
import sys
import urllib.error
import urllib.request
from typing import Any

import msgspec

from headwater.launch.config import ServerArgs
from headwater.messages.cache import CachePersisted, PersistCache
from headwater.messages.control import Failed
from headwater.messages.wire import decode_to_client, encode

POLL_S = 0.1
_ANSWER_S = 5.0
_STOP_S = 10.0


def own_args(args: ServerArgs, *, host: str, is_fleet_replica: bool) -> ServerArgs:
    """The arguments of one server, on free ports. Without an admin key it gets a random one."""
    changes = {"fleet_replica": True, "engine_restarts": 0} if is_fleet_replica else {}
    return msgspec.structs.replace(
        args,
        host=host,
        port=_free_port(host),
        admin_api_key=args.admin_api_key or secrets.token_urlsafe(32),
        kv_events_endpoint=_on_free_port(args.kv_events_endpoint),
        kv_events_replay_endpoint=_on_free_port(args.kv_events_replay_endpoint),
        **changes,
    )


class LocalServer:
    """Made by `start`. It listens on `host`, on a free port, and its control routes need `admin_key`."""

    def __init__(self, process: asyncio.subprocess.Process, args: ServerArgs) -> None:
        self._process = process
        self.pid = process.pid
        self.url = f"http://{args.host}:{args.port}"
        self.admin_key = args.admin_api_key or ""

    @classmethod
    async def start(cls, args: ServerArgs, *, host: str, is_fleet_replica: bool = False) -> "LocalServer":
        """Returns when it is healthy. RuntimeError if it ends instead."""
        args = own_args(args, host=host, is_fleet_replica=is_fleet_replica)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "headwater.fleet.replica_process", stdin=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(args) + b"\n")
        await process.stdin.drain()
        server = cls(process, args)
        while await asyncio.to_thread(server._status, "/health") != 200:
            server.require()
            await asyncio.sleep(POLL_S)
        return server

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    def require(self) -> None:
        """RuntimeError if it has ended."""
        if self.has_ended:
            raise RuntimeError(f"the server has ended with exit code {self._process.returncode}")

    async def is_idle(self) -> bool:
        """Whether nothing runs and no page is on its way; also if it cannot be asked."""
        answer = await asyncio.to_thread(self._get, "/control/blockers")
        return answer is None or bool(msgspec.json.decode(answer)["is_idle"])

    async def persist(self, *, timeout_s: float) -> CachePersisted | Failed | None:
        """Copy what it has cached to its store, if there is one; None if it does not answer."""
        message = PersistCache(call_id=secrets.token_hex(8), timeout_s=timeout_s)
        try:
            answer = await asyncio.to_thread(self._read, "/control/messages", encode(message), timeout_s + _ANSWER_S)
        except OSError:
            return None
        found = decode_to_client(answer)
        assert isinstance(found, CachePersisted | Failed), "what answers this message"
        return found

    async def stop(self) -> None:
        """Returns when it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # which ends the server in order
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _status(self, path: str) -> int | None:
        try:
            return self._open(path).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def _get(self, path: str) -> bytes | None:
        try:
            return self._read(path)
        except OSError:
            return None

    def _read(self, path: str, body: bytes | None = None, limit_s: float = _ANSWER_S) -> bytes:
        return self._open(path, body, limit_s).read()

    def _open(self, path: str, body: bytes | None = None, limit_s: float = _ANSWER_S) -> Any:
        headers = {"authorization": f"Bearer {self.admin_key}"}
        request = urllib.request.Request(f"{self.url}{path}", data=body, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        return opener.open(request, timeout=limit_s)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _on_free_port(endpoint: str | None) -> str | None:
    """The address with a free port: servers of one host cannot share one."""
    if endpoint is None:
        return None
    return f"{endpoint.rpartition(':')[0]}:{_free_port('')}"
