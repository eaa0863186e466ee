"""Which replica keeps a stored response: a request that goes on from one has to reach it. No sockets."""

import re
from collections import OrderedDict
from typing import Any

import msgspec

from headwater.generation.errors import ApiError

PATH = "/v1/responses"
MAX_KNOWN = 100_000
_HEAD_BYTES = 1 << 16  # of an answer, in which its id stands
_ID = re.compile(rb'"id":\s*"(resp_[0-9a-f]+)"')


class ResponseOwners:
    """Numbers of replicas by the ids of the responses that they gave. The oldest are forgotten first."""

    def __init__(self, *, max_known: int = MAX_KNOWN) -> None:
        self._max_known = max_known
        self._owners: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def learn(self, id: str, number: int) -> None:
        self._owners[id] = number
        self._owners.move_to_end(id)
        while len(self._owners) > self._max_known:
            self._owners.popitem(last=False)

    def of(self, id: str) -> int | None:
        """None: this front does not know, so every replica gives the same answer as another."""
        return self._owners.get(id)


class IdReader:
    """Finds the id in the first chunks of an answer of `/v1/responses`, a stream or not."""

    def __init__(self) -> None:
        self._head = b""
        self._is_done = False

    def read(self, chunk: bytes) -> str | None:
        """The id, once, in the chunk that completes it."""
        if self._is_done:
            return None
        self._head += chunk
        found = _ID.search(self._head)
        self._is_done = found is not None or len(self._head) > _HEAD_BYTES
        return None if found is None else found[1].decode()


def asked_for(method: str, path: str, body: bytes) -> tuple[str, str] | None:
    """The response that a request is about, and the parameter that names it; None: it is about none."""
    if not path.startswith(PATH):
        return None
    if path == PATH and method == "POST":
        try:
            fields: Any = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        id = fields.get("previous_response_id") if isinstance(fields, dict) else None
        return (id, "previous_response_id") if isinstance(id, str) else None
    id = path[len(PATH) :].strip("/").partition("/")[0]
    return (id, "response_id") if id.startswith("resp_") else None


def not_there(id: str, param: str) -> ApiError:
    """As a single server answers for a response that it does not keep."""
    text = f"{param}: response {id!r} is not stored: the replica that gave it has left the fleet; send the whole "
    code = "previous_response_not_found" if param == "previous_response_id" else "not_found"
    return ApiError(404, text + "conversation as input", param=param, code=code, type="invalid_request_error")
