"""The API process once its port is open: the HTTP side, the engines' supervisors, and the way down.

The engine processes load the model while this process imports the web framework and loads the tokenizer.
Until both are done, /health answers 503. Nothing here may import torch.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from headwater.client.engine_client import EngineClient
from headwater.client.errors import EngineGone
from headwater.devices.cpu.thread_plan import confine_process
from headwater.generation.chat.formats import FormatFlags
from headwater.generation.model_facts import RequestLimits
from headwater.heap import freeze_heap, give_back_memory
from headwater.http_api.app import create_app
from headwater.http_api.connection import ConnectionLimits
from headwater.http_api.http_server import HttpServer
from headwater.http_api.sites import SitePolicy
from headwater.http_api.state import ApiState, DashboardSettings, FlushDefaults
from headwater.launch.config import ServerArgs
from headwater.launch.facts_builder import build_model_facts, tokenizer_path
from headwater.messages.state import EngineReady
from headwater.server.banner import print_banner
from headwater.server.descriptors import default_max_connections, raise_descriptor_limit
from headwater.server.exits import EXIT_FAILED, EXIT_REFUSED, print_error
from headwater.server.request_watchers import open_tracer, request_watchers
from headwater.server.supervisor import EngineExit, EngineSupervisor
from headwater.tokenization.tokenizer import Tokenizer
from headwater.transports.staging import StagingArea

STREAMS_GRACE_S = 1.0  # for running streams to finish before they are ended
HTTP_GRACE_S = 2.0  # for connections, before they are closed
ENGINE_GRACE_S = 1.5  # from SIGTERM to SIGKILL; the sum of all graces stays under 5 s
IDLE_S = 2.0  # without a request, until what the first grammar needs is started
GONE_LINGER_S = 1.0  # after the engine died, so that clients and probes get a 503 instead of a closed port

log = logging.getLogger(__name__)


class ApiProcess:
    """Serves HTTP for engines that supervisors have started, until a signal, an error or the last engine's end."""

    def __init__(
        self,
        args: ServerArgs,
        *,
        listener: socket.socket,
        supervisors: Sequence[EngineSupervisor],
        endpoints: Sequence[str],
        stop_requested: asyncio.Event,
        on_ready: Callable[[], None],
        api_cpus: tuple[int, ...] = (),
    ) -> None:
        """`on_ready` is called once, directly before the banner. `api_cpus` are those that engines on a CPU leave."""
        self._api_cpus = api_cpus
        self._args = args
        self._listener = listener
        self._supervisors = supervisors
        self._stop_requested = stop_requested
        self._on_ready = on_ready
        self._client = EngineClient(endpoints, started_with=(args.model or "", args.load_format))
        for supervisor in supervisors:
            supervisor.weights = lambda: self._client.weights_to_load
            supervisor.is_missed = lambda: not self._client.can_serve
        self._tracer = open_tracer(args)
        self._state = self._make_state()
        self._http = HttpServer(
            create_app(self._state),
            connection_limits(args),
            log_level="info" if args.log_level == "debug" else "warning",
            access_log=args.log_level == "debug",
            timeout_graceful_shutdown=int(HTTP_GRACE_S),
        )

    async def run(self) -> int:
        """Serve; return the exit code when the HTTP server and all engines have ended."""
        await self._client.start()
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        engines = [
            asyncio.create_task(s.run(on_gone=self._on_gone(s.index), on_back=self._on_back(s.index)))
            for s in self._supervisors
        ]
        loading = asyncio.create_task(self._load())
        try:
            return await self._watch(http, engines, loading)
        finally:
            loading.cancel()
            await self._shut_down(http)
            ending: list[asyncio.Task] = [*engines, loading]
            await asyncio.gather(*ending, return_exceptions=True)

    def _make_state(self) -> ApiState:
        return ApiState(
            client=self._client,
            server_args=self._args.public(),
            api_key=self._args.api_key,
            admin_api_key=self._args.admin_api_key,
            is_replica=self._args.fleet_replica,
            sites=site_policy(self._args),
            dashboard=DashboardSettings.of_server(
                is_disabled=self._args.disable_dashboard, shows_text=self._args.dashboard_show_text
            ),
            on_request_ended=request_watchers(self._args, self._tracer),
            limits=RequestLimits(
                max_body_bytes=self._args.max_body_bytes,
                max_control_timeout_s=self._args.max_control_timeout,
                max_stored_responses=self._args.max_stored_responses,
                max_stored_response_bytes=self._args.max_stored_response_bytes,
                max_concurrency_per_key=self._args.max_concurrency_per_key,
            ),
            special_tokens=self._args.parse_special_tokens,
            flush_defaults=FlushDefaults(self._args.flush_default_timeout, self._args.flush_default_mode),
            staging=StagingArea(Path(self._args.staging_dir), max_bytes=self._args.max_staged_weights_bytes),
            allows_pickles=self._args.allow_pickled_tensors,
            stages_on_gpu=self._args.stage_weights_on_gpu == "auto" and self._args.dp_size * self._args.tp_size == 1,
            format_flags=FormatFlags(self._args.tool_call_parser, self._args.tool_prompt, self._args.reasoning_parser),
        )

    def _on_gone(self, index: int) -> Callable[[str], None]:
        return lambda reason: self._client.engine_gone(index, reason)

    def _on_back(self, index: int) -> Callable[[str], None]:
        return lambda endpoint: self._client.engine_back(index, endpoint)

    async def _load(self) -> None:
        """Load the tokenizer, wait for the engines, then begin to serve requests."""
        tokenizer = asyncio.create_task(asyncio.to_thread(Tokenizer.load, tokenizer_path(self._args)))
        tokenizer.add_done_callback(lambda task: task.cancelled() or task.exception())  # an unused error is no warning
        tokenizer.add_done_callback(lambda _: freeze_heap())
        engines = await self._wait_for_engines()  # awaited first: if both fail, the model's error is shown
        ready = engines[0]
        facts = build_model_facts(self._args, ready)
        loaded = await tokenizer
        if ready.compute is not None and ready.compute.is_pinned:
            confine_process(self._api_cpus)
        self._state.set_ready(tokenizer=loaded, model=facts)
        self._on_ready()
        print_banner(
            facts,
            ready,
            listener=self._listener,
            num_engines=self._args.dp_size,
            num_ranks=self._args.tp_size,
            gpus=[each.gpus for each in engines],
            needs_key=self._args.api_key is not None,
            has_dashboard=not self._args.disable_dashboard,
        )
        give_back_memory()  # the tokenizer's files were read
        await self._prepare_grammars()

    async def _prepare_grammars(self) -> None:
        """Start what checks grammars, once the server has been idle for a while."""
        loop = asyncio.get_running_loop()
        busy_at_s = loop.time()
        while loop.time() - busy_at_s < IDLE_S:
            await asyncio.sleep(IDLE_S / 4)
            if self._client.num_running:
                busy_at_s = loop.time()
        await self._state.grammars.prepare()

    async def _wait_for_engines(self) -> tuple[EngineReady, ...]:
        while True:
            try:
                return await self._client.wait_ready()
            except EngineGone:  # it may be restarted; if not, `_watch` ends the server
                await asyncio.sleep(0.1)

    async def _watch(
        self,
        http: "asyncio.Task[None]",
        engines: "Sequence[asyncio.Task[EngineExit]]",
        loading: "asyncio.Task[None]",
    ) -> int:
        """Wait for the first event that ends this server; return its exit code."""
        stop = asyncio.create_task(self._stop_requested.wait())
        waiting: set[asyncio.Task] = {http, *engines, loading, stop}
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if stop in done:
                log.info("shutting down")
                return 0
            for engine in done.intersection(engines):
                return await self._after_engine_ended(engine.result(), was_ready=self._state.model is not None)
            if http in done:
                http.result()
                print_error("the HTTP server ended unexpectedly")
                return EXIT_FAILED
            error = loading.exception()
            if isinstance(error, ValueError | OSError):
                print_error(str(error))
                return EXIT_REFUSED
            if error is not None:
                raise error

    async def _after_engine_ended(self, end: EngineExit, *, was_ready: bool) -> int:
        print_error(end.reason)
        if was_ready:
            await asyncio.sleep(GONE_LINGER_S)
        return EXIT_REFUSED if end.was_refused else EXIT_FAILED

    async def _shut_down(self, http: "asyncio.Task[None]") -> None:
        """End streams, then connections, then the engines; under 5 s, even if one of them hangs."""
        streams_grace_s = STREAMS_GRACE_S if self._client.num_running else 0.0
        self._state.begin_shutdown(grace_s=streams_grace_s)
        self._http.should_exit = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(http, return_exceptions=True), HTTP_GRACE_S + 0.5)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        await asyncio.gather(*(supervisor.stop(ENGINE_GRACE_S) for supervisor in self._supervisors))


def connection_limits(args: ServerArgs) -> ConnectionLimits:
    """Limits of connections. Without --max-connections, their number follows from the limit on open files."""
    return ConnectionLimits(
        max_connections=args.max_connections or default_max_connections(raise_descriptor_limit()),
        max_header_bytes=args.max_header_bytes,
        header_timeout_s=args.header_timeout,
        keep_alive_s=args.keep_alive_timeout,
    )


def site_policy(args: ServerArgs) -> SitePolicy:
    """The web origins that may use the server, and the host names that it accepts."""
    return SitePolicy.of_server(
        args.host,
        has_api_key=args.api_key is not None,
        origins=args.allowed_origins,
        hosts=args.allowed_hosts,
    )
