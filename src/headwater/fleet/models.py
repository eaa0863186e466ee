"""Several models behind one address: each has a `Front` of its own, and a request goes to that of its model.

Control calls name a model (`?model=NAME`), or go to all models at once and get one answer (`merging`).
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec

from headwater.fleet.front import FLEET, SCALE, Front
from headwater.fleet.merging import REPORTS, Taken, merged
from headwater.fleet.proxy import ClientLeft, Message, Receive, Send, read_body, unless_left
from headwater.fleet.responses import asked_for
from headwater.generation.errors import ApiError, bad_request, model_not_found
from headwater.http_api.app import ROUTERS, control_paths, guarded
from headwater.http_api.auth import Keys
from headwater.http_api.error_handlers import error_response
from headwater.launch.config import ServerArgs

MODEL = "model"  # the query parameter, and the field of bodies
SERVES_HEADER = b"serve_multiplexed_model_id"  # the name that Ray Serve has for the same
_CARD = "/v1/models/"
_LOADS_ADAPTER = ("/v1/load_lora_adapter", "/load_lora_adapter")
# control calls whose content is that of one model
_OF_ONE_MODEL = (
    SCALE, "/update_weights", "/begin_weight_update", "/end_weight_update", "/abort_weight_update",
    "/init_weights_update_group", "/destroy_weights_update_group", "/update_weight_version", "/get_weights_by_name",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter",
    "/cache/warm", "/cache/pin/", "/control/operations/", "/control/messages", "/dashboard",
)  # fmt: skip
_OF_ANY = "/dashboard/files/"
_OF_ONE_MODEL_BY_POST = ("/cache/pin",)
_REPORTS = (
    *REPORTS, "/health", "/health_generate", "/ping", "/ready", "/server_info", "/get_server_info", "/model_info",
    "/get_model_info", "/get_weight_version", "/v1/loads", "/get_load", "/cache", "/get_kv_event_sources",
)  # fmt: skip
log = logging.getLogger(__name__)


class ModelsFront:
    """An ASGI application over the fronts of several models, which belong to its event loop."""

    def __init__(self, fronts: Mapping[str, Front], args: ServerArgs) -> None:
        """`fronts` by the name of the model, made with `is_guarded=False`. `args`: whose keys and limits count."""
        self.fronts = dict(fronts)
        first = next(iter(self.fronts.values()))
        self._control = tuple(control_paths(ROUTERS))
        self._app = guarded(
            self._answer,
            keys=Keys(args.api_key, args.admin_api_key),
            limits=first.state.limits,
            sites=first.state.sites,
            end=self._end,
            on_ended=first.state.on_request_ended,
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _end(self) -> None:
        for front in self.fronts.values():
            await front.close()

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            name, scope = _named_outside(scope)
            if name is not None:
                if scope["path"] in _LOADS_ADAPTER:
                    body = await read_body(receive)
                    self._refuse_taken(body, model=name)
                    receive = _again(body, receive)
                await self._front(name)(scope, receive, send)
            elif self._is_for_all(scope):
                body = await read_body(receive)
                if name := _name_in(body):
                    await self._front(name)(scope, _again(body, receive), send)
                    return
                taken = await unless_left(self._of_all(scope, body), receive)
                await _send(taken, send)
            else:
                await self._of_one(scope, receive, send)
        except ClientLeft:
            log.debug("a client left")
        except ApiError as error:
            await error_response(error)(scope, receive, send)

    def _is_for_all(self, scope: Message) -> bool:
        """Whether a call that names no model goes to all of them. ApiError if it has to name one."""
        method, path = scope["method"], scope["path"]
        if path.startswith(_OF_ANY):
            return False
        is_of_one = path.startswith(_OF_ONE_MODEL) or (method == "POST" and path in _OF_ONE_MODEL_BY_POST)
        if is_of_one:
            text = f"model: {path} concerns one model: add ?model=NAME, one of {self._names}"
            raise bad_request(MODEL, text, code="missing")
        return path == FLEET or path in _REPORTS or path.startswith(self._control)

    async def _of_all(self, scope: Message, body: bytes) -> Taken:
        calls = [_taken(front, scope, body) for front in self.fronts.values()]
        answers = await asyncio.gather(*calls)
        return merged(scope["path"], dict(zip(self.fronts, answers, strict=True)))

    async def _of_one(self, scope: Message, receive: Receive, send: Send) -> None:
        """A request for text: its body, or its path, says for which model."""
        path = scope["path"]
        if path.startswith(_CARD):
            await self._front(path.removeprefix(_CARD))(scope, receive, send)
            return
        body = await read_body(receive)
        if body or scope["method"] not in ("GET", "HEAD", "DELETE"):
            front = self._front(_named_inside(body, self._names))
        else:  # about a stored response, or the API's documentation
            response = asked_for(scope["method"], path, body)
            keepers = [each for each in self.fronts.values() if response and each.gave_response(response[0])]
            front = next(iter(keepers or self.fronts.values()))
        await front(scope, _again(body, receive), send)

    def _front(self, name: str) -> Front:
        """The front of a model, or of that whose LoRA adapter has this name. ApiError 404."""
        if (front := self.fronts.get(name)) is not None:
            return front
        owners = [front for front in self.fronts.values() if name in front.client.adapters()]
        if len(owners) > 1:
            names = sorted(model for model, front in self.fronts.items() if front in owners)
            text = f"model: {', '.join(names)} have an adapter {name!r}: add ?model= with one of them"
            raise bad_request(MODEL, text)
        if owners:
            return owners[0]
        raise model_not_found(name, *self.fronts)

    def _refuse_taken(self, body: bytes, *, model: str) -> None:
        """ApiError 400 for an adapter's name under which requests would reach another model."""
        try:
            name = msgspec.json.decode(body, type=_Loaded).lora_name
        except (msgspec.DecodeError, UnicodeDecodeError):
            return  # the front of the model says what is wrong with it
        others = {each for other, front in self.fronts.items() if other != model for each in front.client.adapters()}
        if name in self.fronts or (isinstance(name, str) and name in others):
            raise bad_request("lora_name", f"lora_name: {name!r} is the name of a model, or of another model's adapter")

    @property
    def _names(self) -> str:
        return ", ".join(repr(name) for name in self.fronts)


def _named_outside(scope: Message) -> tuple[str | None, Message]:
    """The model that the query or Ray Serve's header names, and the scope without that."""
    header = next((value.decode("latin-1") for name, value in scope["headers"] if name == SERVES_HEADER), None)
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    names = [value for name, value in query if name == MODEL] + ([header] if header else [])
    if not names:
        return None, scope
    if len(set(names)) > 1:
        text = f"model: {' and '.join(map(repr, names))} are named; a call is about one, or about all"
        raise bad_request(MODEL, text)
    rest = urlencode([(name, value) for name, value in query if name != MODEL]).encode()
    return names[0], {**scope, "query_string": rest}


class _Named(msgspec.Struct):
    model: Any = None


class _Loaded(msgspec.Struct):
    lora_name: Any = None


def _named_inside(body: bytes, names: str) -> str:
    """The `model` of a JSON body. ApiError 400 without one."""
    try:
        name = msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not a JSON object: {error}", code="invalid_json") from None
    if not isinstance(name, str) or not name:
        raise bad_request(MODEL, f"model: several models are served; name one of {names}", code="missing")
    return name


def _name_in(body: bytes) -> str | None:
    """The `model` of a control call's body, if it is an object that names one."""
    try:
        name = msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # the fronts say what is wrong with it, if anything is
    if name is not None and not isinstance(name, str):
        raise bad_request(MODEL, f"model: must be the name of a model, found {name!r}")
    return name


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what comes after it: that the client leaves."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return rest.pop() if rest else await receive()

    return read


@dataclass(slots=True)
class _Taking:
    """Collects an answer."""

    status: int = 500
    headers: Any = ()
    body: bytes = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message.get("headers", ())
        else:
            self.body += message.get("body", b"")


async def _taken(front: Front, scope: Message, body: bytes) -> Taken:
    """The whole answer of one front. Ends when it is cancelled, as a request whose client leaves."""
    own = {name: value for name, value in scope.items() if not name.startswith("headwater.")}
    taking = _Taking()
    await front({**own, "path_params": {}}, _again(body, asyncio.Event().wait), taking.send)  # type: ignore[arg-type]
    return Taken(taking.status, taking.headers, taking.body)


async def _send(taken: Taken, send: Send) -> None:
    headers = [(name, value) for name, value in taken.headers if name.lower() != b"content-length"]
    await send({"type": "http.response.start", "status": taken.status, "headers": headers})
    await send({"type": "http.response.body", "body": taken.body})
