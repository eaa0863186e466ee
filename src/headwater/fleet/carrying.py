"""Brings tensors that the front has received to a replica on another machine, before a message names them."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import msgspec

from headwater.messages.base import Call
from headwater.messages.control import Failed
from headwater.messages.two_phase import Prepare, answered_under
from headwater.messages.weights import UpdateWeights
from headwater.transports.carried import PIECE_BYTES

STAGED = "/control/staged"
Post = Callable[[str, bytes, dict[str, str]], Awaitable[tuple[int, bytes, float]]]  # -> status, body, its clock


@dataclass(frozen=True, slots=True)
class Destination:
    """The server of a replica."""

    url: str
    admin_key: str
    post: Post


class CannotCarry(Exception):
    """The replica does not take the tensors, in its own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def answer_to(self, message: Call) -> Failed:
        return Failed(call_id=answered_under(message), status=self.status, message=f"the tensors: {self}")


class Carrying:
    """One for each replica. Each folder is carried once, however many messages name it at the same time."""

    def __init__(self, ids_in_use: Callable[[], Iterable[str]]) -> None:
        """`ids_in_use`: weights that a replica may read, now or again. It deletes the others when it is sent more."""
        self._ids_in_use = ids_in_use
        self._carried: dict[str, asyncio.Task[str]] = {}  # path on the replica, by the identity of the weights

    async def with_own_path(self, message: Call, to: Destination) -> Call:
        """The message, with the replica's path of tensors that it names. Raises OSError, CannotCarry."""
        change = message.change if isinstance(message, Prepare) else message
        if not isinstance(change, UpdateWeights) or not change.weights_id:
            return message
        task = self._carried.get(change.weights_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.ensure_future(self._carry(change, to))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # those who wait have it
            in_use = set(self._ids_in_use())
            self._carried = {id: each for id, each in self._carried.items() if id in in_use} | {change.weights_id: task}
        change = msgspec.structs.replace(change, path=await asyncio.shield(task))
        return msgspec.structs.replace(message, change=change) if isinstance(message, Prepare) else change

    async def _carry(self, change: UpdateWeights, to: Destination) -> str:
        """The path on the replica."""
        path = ""
        for file in sorted(await asyncio.to_thread(os.listdir, change.path)):
            if file.endswith(".safetensors"):
                path = await self._carry_file(Path(change.path, file), change.weights_id, to)
        return path

    async def _carry_file(self, file: Path, weights_id: str, to: Destination) -> str:
        size, offset, path = (await asyncio.to_thread(file.stat)).st_size, 0, ""
        keep = ",".join(self._ids_in_use())
        headers = {"authorization": f"Bearer {to.admin_key}", "content-type": "application/octet-stream"}
        while offset < size:
            piece = await asyncio.to_thread(_read, file, offset)
            query = {"weights_id": weights_id, "bucket": file.name, "offset": offset, "keep": keep}
            url = f"{to.url}{STAGED}?{urlencode(query)}"
            status, answer, _ = await to.post(url, piece, headers)
            if status != 200:
                raise CannotCarry(status, _words(answer))
            path, offset = msgspec.json.decode(answer)["path"], offset + len(piece)
        return path


def _read(file: Path, offset: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(PIECE_BYTES)


def _words(answer: bytes) -> str:
    try:
        return msgspec.json.decode(answer)["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")
