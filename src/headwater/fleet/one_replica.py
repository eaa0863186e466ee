"""Routes that one replica carries out, or each for itself: the answer says which it was."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from headwater.client.errors import EngineOut
from headwater.fleet.client import FleetClient
from headwater.fleet.proxy import Forward
from headwater.fleet.replica import Replica
from headwater.fleet.routing import choose_replica, routing_key
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError, as_api_error, bad_request
from headwater.http_api.engine_answers import engine_list

WARM, PIN, RESPONSES = "/cache/warm", "/cache/pin", "/cache/responses"
SOURCES, SOURCES_BY_RANK = "/get_kv_event_sources", "/kv_event_sources"
OPEN = (SOURCES, SOURCES_BY_RANK)  # without the admin key
_LISTS = ("text", "input_ids")
_SUMS = ("prompt_tokens", "cached_tokens", "computed_tokens")
_ANYWHERE = ("*", "0.0.0.0", "[::]")  # addresses that a server listens on, and a subscriber cannot use


@dataclass(slots=True)
class OneReplica:
    """Belongs to the event loop of `client`."""

    client: FleetClient
    forward: Forward

    def handler(self, method: str, path: str) -> Callable[[bytes], Awaitable[Any]] | None:
        """What makes the JSON answer to a request from its body; None: this is no such route. Raises ApiError."""
        routes = {
            ("POST", WARM): self.warm,
            ("POST", PIN): self.pin,
            ("DELETE", RESPONSES): self.drop_responses,
            ("GET", SOURCES): self.sources,
            ("GET", SOURCES_BY_RANK): self.sources_by_rank,
        }
        if method == "DELETE" and path.startswith(f"{PIN}/"):
            return lambda _: self.unpin(path.removeprefix(f"{PIN}/"))
        return routes.get((method, path))

    async def warm(self, body: bytes) -> Json:
        """Each prefix on the replica that requests with it will go to; all of them on each replica that is named."""
        fields = _object(body)
        named = self._named(fields)
        if named is not None:
            work = dict.fromkeys(named, fields)
            found = await self._on_each(WARM, work, learns=True)
            items = [item for number, facts in found.items() for item in _numbered(facts["items"], number)]
        else:
            items = await self._warm_each(fields)
        return {"success": True} | {name: sum(item[name] for item in items) for name in _SUMS} | {"items": items}

    async def _warm_each(self, fields: Json) -> list[Json]:
        """The items in the order of the prefixes."""
        prefixes = _split(fields)
        places: dict[Replica, list[int]] = {}
        for place, prefix in enumerate(prefixes):
            places.setdefault(self._chosen(prefix), []).append(place)
        work = {replica: _joined([prefixes[place] for place in there]) for replica, there in places.items()}
        found = await self._on_each(WARM, work, learns=False)
        items: dict[int, Json] = {}
        for replica, there in places.items():
            items |= zip(there, _numbered(found[replica.number]["items"], replica.number), strict=True)
        return [items[place] for place in range(len(prefixes))]

    async def pin(self, body: bytes) -> Json:
        fields = _object(body)
        replicas = self._named(fields) or [self._chosen(fields)]
        found = await self._on_each(PIN, dict.fromkeys(replicas, fields), learns=True)
        pins: list[Json] = []
        for number, facts in found.items():
            pins += [pin | {"pin_id": _renumbered(pin["pin_id"], number)} for pin in _numbered(facts["pins"], number)]
        pin_id = ",".join(pin["pin_id"] for pin in pins)
        return {"success": True, "pin_id": pin_id, "num_tokens": pins[0].get("num_tokens", 0), "pins": pins}

    async def unpin(self, pin_id: str) -> Json:
        calls = []
        for part in pin_id.split(","):
            number, _, name = part.partition(".")
            replica = self.client.replicas.get(int(number)) if number.isdecimal() else None
            if replica is None or not name:  # a replica that has left has no pins any more
                raise ApiError(404, f"no pin {part!r} exists", param="pin_id", code="not_found")
            calls.append((replica, name))
        for replica, name in calls:
            await self._call(replica, f"{PIN}/0.{name}", method="DELETE")
        return {"success": True, "pin_id": pin_id}

    async def drop_responses(self, _: bytes) -> Json:
        found = await self._on_all(RESPONSES, method="DELETE")
        sums = {name: sum(facts[name] for facts in found.values()) for name in ("dropped", "bytes")}
        return {"success": True} | sums | {"engines": [{"dp_rank": number} | each for number, each in found.items()]}

    async def sources(self, _: bytes) -> list[Json]:
        found = await self._on_all(SOURCES, method="GET", serving=True)
        return [
            source | {"data_parallel_rank": number} | self._reachable(source, number)
            for number, listed in found.items()
            for source in listed
        ]

    async def sources_by_rank(self, _: bytes) -> Json:
        found = await self._on_all(SOURCES_BY_RANK, method="GET", serving=True)
        return {
            str(number): source | self._reachable(source, number)
            for number, listed in found.items()
            for source in listed.values()
        }

    def _reachable(self, source: Json, number: int) -> Json:
        """Its addresses, with the host of the replica where it listens on all."""
        host = self.client.replicas[number].beat.node if number in self.client.replicas else ""
        found = {}
        for name in ("endpoint", "replay_endpoint"):
            scheme, _, rest = str(source.get(name) or "").partition("://")
            address, _, port = rest.rpartition(":")
            if address in _ANYWHERE and host:
                found[name] = f"{scheme}://{host}:{port}"
        return found

    # --- replicas ------------------------------------------------------------------------------------

    def _named(self, fields: Json) -> list[Replica] | None:
        """The replicas in `routed_dp_rank`, one number or a list, which it takes out; None: none is named."""
        given = fields.pop("routed_dp_rank", None)
        if given is None:
            return None
        numbers: list[Any] = given if isinstance(given, list) and given else [given]
        members = sorted(self.client.replicas)
        for number in numbers:
            if not isinstance(number, int) or isinstance(number, bool) or number not in members:
                raise bad_request("routed_dp_rank", f"routed_dp_rank: the replicas are {members}, got {number!r}")
            if (why := self.client.why_out(number)) is not None:
                raise as_api_error(EngineOut(number, why)) or AssertionError
        return [self.client.replicas[number] for number in dict.fromkeys(numbers)]

    def _chosen(self, fields: Json) -> Replica:
        candidates = self.client.candidates()
        if not candidates:
            raise ApiError(503, "no replica takes requests now", code="no_replica")
        return choose_replica(candidates, routing_key(msgspec.json.encode(fields)), self.client.routes)

    async def _on_each(self, path: str, work: dict[Replica, Json], *, learns: bool) -> dict[int, Any]:
        """The answers by number. ApiError if one failed. `learns`: requests that begin alike go there from now on."""
        for replica, fields in work.items():
            for prefix in _split(fields) if learns else []:
                if (key := routing_key(msgspec.json.encode(prefix))) is not None:
                    self.client.routes.learn(key, replica.number)
        calls = [self._call(replica, path, msgspec.json.encode(fields)) for replica, fields in work.items()]
        return _all_or_raise([replica.number for replica in work], await asyncio.gather(*calls, return_exceptions=True))

    async def _on_all(self, path: str, *, method: str, serving: bool = False) -> dict[int, Any]:
        """The answers of all replicas, or of all that serve, by number. ApiError if one failed."""
        replicas = self.client.candidates() if serving else list(self.client.replicas.values())
        if not replicas:
            raise ApiError(503, "no replica takes requests now", code="no_replica")
        calls = [self._call(replica, path, method=method) for replica in replicas]
        return _all_or_raise([each.number for each in replicas], await asyncio.gather(*calls, return_exceptions=True))

    async def _call(self, replica: Replica, path: str, body: bytes = b"", *, method: str = "POST") -> Any:
        """The answer's JSON. ApiError: the replica's own, or 503 if it cannot be reached."""
        key = f"Bearer {replica.beat.admin_key}".encode()
        headers = [(b"authorization", key), (b"content-type", b"application/json"), (b"accept", b"application/json")]
        replica.num_running += 1  # so that it does not end meanwhile
        try:
            async with (
                replica.while_there(begins=True),
                self.forward(method, f"{replica.beat.url}{path}", headers=headers, body=body) as answer,
            ):
                facts = msgspec.json.decode(b"".join([chunk async for chunk in answer.chunks()]))
        except (OSError, msgspec.DecodeError) as error:
            self.client.suspect(replica)
            text = f"replica {replica.number} cannot be reached: {str(error) or 'it is silent'}"
            raise ApiError(503, text, code="engine_gone") from None
        finally:
            replica.num_running -= 1
        if answer.status >= 400:
            error = facts.get("error", {})
            words = {name: error.get(name) for name in ("param", "code", "type")}
            raise ApiError(answer.status, error.get("message", f"status {answer.status}"), **words)
        return facts


def _all_or_raise(numbers: Sequence[int], answers: Sequence[Any]) -> dict[int, Any]:
    found = dict(zip(numbers, answers, strict=True))
    errors: dict[int, ApiError] = {}
    for number, answer in found.items():
        if isinstance(answer, ApiError):
            errors[number] = answer
        elif isinstance(answer, BaseException):
            raise answer
    if not errors:
        return found
    number, worst = max(errors.items(), key=lambda item: item[1].status)
    done = [each for each in numbers if each not in errors]
    message = f"{worst.message}; done on {engine_list(done)}" if done else worst.message
    raise ApiError(
        worst.status, message, param=worst.param, code=worst.code, type=worst.type, details={"engine": number}
    )


def _object(body: bytes) -> Json:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return fields


def _split(fields: Json) -> list[Json]:
    """One body for each prefix of a batch."""
    for name in _LISTS:
        values = fields.get(name)
        if isinstance(values, list) and values and (name == "text" or isinstance(values[0], list)):
            return [fields | {name: value} for value in values]
    return [fields]


def _joined(prefixes: list[Json]) -> Json:
    """The inverse of `_split`, for prefixes of one batch."""
    if len(prefixes) == 1:
        return prefixes[0]
    name = next(name for name in _LISTS if name in prefixes[0])
    return prefixes[0] | {name: [prefix[name] for prefix in prefixes]}


def _numbered(entries: list[Json], number: int) -> list[Json]:
    return [entry | {"dp_rank": number} for entry in entries]


def _renumbered(pin_id: str, number: int) -> str:
    return f"{number}.{pin_id.partition('.')[2]}"
