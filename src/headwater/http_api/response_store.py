"""Responses that the server keeps in memory, so that a client can go on from one without sending it again."""

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError

Namespace = tuple[int, str, str]  # the key's account, cache_salt, extra_key: conversations do not cross them


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response. Its conversation is a copy, so it does not depend on whether earlier responses are kept."""

    response: bytes  # JSON of the answer
    input_items: bytes  # JSON of the list of the request's own items
    conversation: bytes  # JSON of the list of a chat's messages, this answer included, instructions not
    item_ids: tuple[str, ...]  # of the output
    namespace: Namespace

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.input_items) + len(self.conversation)


class ResponseStore:
    """The newest responses within two bounds. The one that was used longest ago is dropped first."""

    def __init__(self, *, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_dropped = 0  # for lack of room
        self._by_id: OrderedDict[str, StoredResponse] = OrderedDict()
        self._response_of_item: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def put(self, id: str, stored: StoredResponse) -> None:
        """Keep a response. One that is larger than the whole store is dropped at once."""
        self._by_id[id] = stored
        self.num_bytes += stored.num_bytes
        self._response_of_item |= dict.fromkeys(stored.item_ids, id)
        while len(self._by_id) > self.max_responses or self.num_bytes > self.max_bytes:
            self._remove(next(iter(self._by_id)))
            self.num_dropped += 1

    def get(self, id: str, *, account: int) -> StoredResponse:
        """A stored response. ApiError 404 if it is not kept, or was stored with another key."""
        stored = self._by_id.get(id)
        if stored is None or stored.namespace[0] != account:
            raise self._not_found(id, param="response_id")
        self._by_id.move_to_end(id)
        return stored

    def conversation(self, id: str, namespace: Namespace) -> list[Json]:
        """The messages up to a response. ApiError 404 if it is not kept, or belongs to another namespace."""
        stored = self._by_id.get(id)
        if stored is None or stored.namespace != namespace:
            raise self._not_found(id, param="previous_response_id")
        self._by_id.move_to_end(id)
        return msgspec.json.decode(stored.conversation)

    def item(self, id: str, namespace: Namespace) -> Json | None:
        """An item of the output of a stored response; None if there is none."""
        stored = self._by_id.get(self._response_of_item.get(id, ""))
        if stored is None or stored.namespace != namespace:
            return None
        return next(item for item in msgspec.json.decode(stored.response)["output"] if item["id"] == id)

    def delete(self, id: str, *, account: int) -> None:
        """Forget a response. ApiError 404 if it is not kept, or was stored with another key."""
        self.get(id, account=account)
        self._remove(id)

    def facts(self) -> Json:
        """Numbers for operators."""
        return {
            "responses": len(self._by_id),
            "bytes": self.num_bytes,
            "max_responses": self.max_responses,
            "max_bytes": self.max_bytes,
            "dropped": self.num_dropped,
        }

    def clear(self) -> tuple[int, int]:
        """Forget all; the number of responses and their bytes."""
        freed = len(self._by_id), self.num_bytes
        self._by_id.clear()
        self._response_of_item.clear()
        self.num_bytes = 0
        return freed

    def _remove(self, id: str) -> None:
        stored = self._by_id.pop(id)
        self.num_bytes -= stored.num_bytes
        for item_id in stored.item_ids:
            self._response_of_item.pop(item_id, None)

    def _not_found(self, id: str, *, param: str) -> ApiError:
        message = (
            f"{param}: response {id!r} is not stored: it was deleted, never stored, or dropped to make room "
            f"(the server keeps up to {self.max_responses} responses in {self.max_bytes} bytes, and none across a "
            "restart); send the whole conversation as input"
        )
        code = "previous_response_not_found" if param == "previous_response_id" else "not_found"
        return ApiError(404, message, param=param, code=code, type="invalid_request_error")
