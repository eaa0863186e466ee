"""The front of a fleet: control and monitoring of all replicas, and everything else from one of them."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec

from headwater.fleet.autoscaling import MAX_REPLICAS, Limits, Scale, Scaling
from headwater.fleet.client import FleetClient, Keep
from headwater.fleet.one_replica import OPEN, OneReplica
from headwater.fleet.proxy import (
    BROKEN_OUTCOMES,
    ClientLeft,
    Forward,
    Message,
    Proxy,
    Receive,
    Send,
    read_body,
    unless_left,
)
from headwater.fleet.replica import Post
from headwater.fleet.watching import IsDead
from headwater.generation.errors import ApiError, bad_request
from headwater.generation.model_facts import RequestLimits
from headwater.http_api.app import FRONT_ROUTERS, FRONT_ROUTES, ROUTERS, control_paths, create_app
from headwater.http_api.auth import Keys
from headwater.http_api.error_handlers import error_response
from headwater.http_api.monitoring.request_log import RequestLog
from headwater.http_api.sites import SitePolicy
from headwater.http_api.state import ApiState, DashboardSettings, FlushDefaults
from headwater.launch.config import ServerArgs
from headwater.launch.facts_builder import build_model_facts, tokenizer_path
from headwater.tokenization.tokenizer import Tokenizer
from headwater.transports.staging import StagingArea

FLEET, SCALE = "/fleet", "/fleet/scale"
_REPLICAS = "replicas"
_GROUP = (
    "the ranks of a trainer's process group are fixed when it is made, and replicas come and go; send the tensors to "
    "/update_weights_from_tensor, or write them where all replicas read and call /update_weights_from_disk"
)
_NOT_CARRIED_OUT = (  # why not, by the beginning of the path
    ("/init_weights_update_group", _GROUP),
    ("/destroy_weights_update_group", _GROUP),
    ("/update_weights_from_distributed", _GROUP),
    ("/control/messages", "it is the way of the front to one engine"),
    ("/control/staged", "it is the way of the front to one engine"),
)
log = logging.getLogger(__name__)


class Front:
    """An ASGI application and the client behind it. Belongs to one event loop, in which `load` runs."""

    def __init__(
        self,
        args: ServerArgs,
        *,
        post: Post,
        forward: Forward,
        is_dead: IsDead,
        scale: Scale,
        limits: Limits | None = None,
        keep: Keep | None = None,
        is_guarded: bool = True,
        shares_files: bool = False,
    ) -> None:
        """`scale` changes the number of replicas; with `limits`, `scaling` does that by itself while it runs.

        `shares_files`: replicas read what the front stages, which are tensors of a trainer; else it is carried to them.
        Without `is_guarded` another application stands before it, with the checks of all requests (`ModelsFront`).
        """
        self._args = args
        self.client = FleetClient(
            post,
            is_dead=is_dead,
            started_with=(args.model or "", args.load_format),
            shares_store=args.hicache_storage_backend == "redis",
            shares_files=shares_files,
            keep=keep,
        )
        self.state = ApiState(
            client=self.client,  # type: ignore[arg-type]  # it has what the routers of a front use
            server_args=args.public(),
            api_key=args.api_key,
            admin_api_key=args.admin_api_key,
            sites=SitePolicy.of_server(
                args.host,
                has_api_key=args.api_key is not None,
                origins=args.allowed_origins,
                hosts=args.allowed_hosts,
            ),
            dashboard=DashboardSettings.of_server(
                is_disabled=args.disable_dashboard, shows_text=args.dashboard_show_text
            ),
            on_request_ended=(RequestLog(shows_text=args.log_prompts).ended,),
            limits=RequestLimits(
                max_body_bytes=args.max_body_bytes,
                max_control_timeout_s=args.max_control_timeout,
            ),
            flush_defaults=FlushDefaults(args.flush_default_timeout, args.flush_default_mode),
            staging=StagingArea(Path(args.staging_dir), max_bytes=args.max_staged_weights_bytes),
            allows_pickles=args.allow_pickled_tensors,
        )
        proxy = Proxy(self.client, forward)
        keys = Keys(args.api_key, args.admin_api_key)
        self.scaling = Scaling(
            scale,
            num_ongoing=lambda: proxy.num_open,
            num_replicas=lambda: self.client.num_engines,
            limits=limits,
        )
        rest = _Rest(self.client, proxy, OneReplica(self.client, forward), keys, self.scaling)
        self._app = create_app(self.state, routes=FRONT_ROUTES, rest=rest, is_guarded=is_guarded)
        self._proxy = proxy
        broken = self._app.state.services.metrics.counter(
            "headwater_fleet_broken_requests",
            "Requests that reached a replica and got no answer: retried on another one, or given up.",
            "model_name",
            "outcome",
        )
        name = args.served_model_name or args.model or ""
        for outcome in BROKEN_OUTCOMES:
            broken.labels(name, outcome)
        proxy.count_broken = lambda outcome: broken.labels(name, outcome).inc()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/health_generate":  # needs no key; an engine generates
            await self._proxy(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def close(self) -> None:
        """It answers nothing any more, and keeps nothing that it has staged."""
        await self._app.state.services.weights.close()
        await self.client.close()

    def gave_response(self, id: str) -> bool:
        """Whether this front has passed on the stored response `id`."""
        return self._proxy.responses.of(id) is not None

    async def load(self) -> None:
        """Returns when a replica has loaded: control routes work from then on."""
        tokenizer = await asyncio.to_thread(Tokenizer.load, tokenizer_path(self._args))
        ready = await self.client.first_ready()
        self.state.set_ready(tokenizer=tokenizer, model=build_model_facts(self._args, ready))


@dataclass(slots=True)
class _Rest:
    """What the routers of the front have no route for."""

    client: FleetClient
    proxy: Proxy
    one_replica: OneReplica
    keys: Keys
    scaling: Scaling
    engines_own: tuple[str, ...] = tuple(control_paths(ROUTERS) - control_paths(FRONT_ROUTERS))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            if path in (FLEET, SCALE):
                await self._of_fleet(scope, send)
            elif (handle := self.one_replica.handler(scope["method"], path)) is not None:
                if path not in OPEN:
                    self._require_admin(scope)
                facts = await unless_left(handle(await read_body(receive)), receive)
                await _send_json(facts, send)
            elif path.startswith(self.engines_own):  # the answer of one replica would pass for that of all
                text = f"{scope['method']} {path} is not carried out by this fleet: {_why_not(path)}"
                raise ApiError(501, text, code="not_on_a_fleet")
            else:
                await self.proxy(scope, receive, send)
        except ClientLeft:
            log.debug("a client left")
        except ApiError as error:
            await error_response(error)(scope, receive, send)

    async def _of_fleet(self, scope: Message, send: Send) -> None:
        """`GET /fleet`, and `POST /fleet/scale` with `replicas`, or with the fields of `Limits`."""
        self._require_admin(scope)
        wanted = "POST" if scope["path"] == SCALE else "GET"
        if scope["method"] != wanted:
            raise ApiError(405, f"{scope['path']} takes {wanted}", headers={"Allow": wanted})
        if wanted == "POST":
            await self._change_scale(parse_qs(scope["query_string"].decode("latin-1")))
        facts = {_REPLICAS: [self._facts(number) for number in sorted(self.client.replicas)]}
        await _send_json(facts | ({"autoscaling": found} if (found := self.scaling.facts) else {}), send)

    async def _change_scale(self, query: dict[str, list[str]]) -> None:
        given = {name: values[0] for name, values in query.items()}
        if (number := given.pop(_REPLICAS, None)) is None:
            try:
                self.scaling.adapt(msgspec.convert(given, Limits, strict=False))
            except (msgspec.ValidationError, ValueError) as error:
                raise bad_request(
                    "max_replicas", f"replicas, or limits for a fleet that scales itself: {error}"
                ) from None
            return
        if given or not number.isdecimal() or not 1 <= int(number) <= MAX_REPLICAS:
            raise bad_request(_REPLICAS, f"replicas: must be from 1 to {MAX_REPLICAS}, and alone; got {number!r}")
        await self.scaling.fix(int(number))

    def _require_admin(self, scope: Message) -> None:
        if (refusal := self.keys.admin_refusal(_authorization(scope))) is not None:
            raise refusal

    def _facts(self, number: int) -> dict[str, Any]:
        replica = self.client.replicas[number]
        why = self.client.why_out(number)
        beat = replica.beat
        facts = {"dp_rank": number, "name": beat.name, "node": beat.node, "pid": beat.pid, "url": beat.url}
        by_order = {"paused": self.client.is_paused, "released": self.client.released}
        return facts | {"serving": why is None, "message": why, "num_running": replica.num_running} | by_order


def _why_not(path: str) -> str:
    return next((why for start, why in _NOT_CARRIED_OUT if path.startswith(start)), "it would reach one replica only")


async def _send_json(facts: Any, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(facts)})


def _authorization(scope: Message) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), "")
