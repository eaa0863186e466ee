"""An engine that answers by script: a ROUTER socket in a thread, for tests of whatever talks to engines.

It keeps the wire contract of `messages` and nothing else: no model, no cache, no scheduler.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import zmq

from headwater.messages.base import unpack_ids
from headwater.messages.control import (
    Done,
    Failed,
    FlushCache,
    FlushResult,
    GetOperations,
    OperationList,
    PauseGeneration,
    PauseResult,
)
from headwater.messages.generation import (
    Abort,
    Finish,
    Generate,
    GenerateBatch,
    LogprobParams,
    Output,
    OutputMeta,
    Outputs,
    TokenLogprob,
)
from headwater.messages.state import EngineReady, EngineState, GetState, Hello, Shutdown, TierState
from headwater.messages.weights import SetWeightVersion, WeightVersionSet
from headwater.messages.wire import decode_to_engine, encode

POLL_MS = 5
T = TypeVar("T")
Reply = Callable[[Generate], Iterator[int]]

READY = EngineReady(
    call_id="",
    model_name="scripted",
    architecture="ScriptedForCausalLM",
    dtype="float32",
    vocab_size=512,
    max_context=256,
    eos_token_ids=(0,),
    page_size=16,
    num_pages=64,
    page_bytes=1024,
    max_running=64,
    weights_id="w0",
    weight_version="default",
    load_s=0.0,
    device="cpu",
)


def echo(request: Generate) -> Iterator[int]:
    """The prompt's tokens over and over."""
    prompt = unpack_ids(request.prompt_ids).tolist()
    while True:
        yield from prompt


@dataclass(slots=True)
class _Running:
    client: bytes
    request: Generate
    tokens: Iterator[int]
    num_outputs: int = 0


@dataclass
class Script:
    """How the engine behaves; may be changed while it runs."""

    reply: Reply = echo
    step_s: float = 0.0  # duration of a step
    is_stalled: bool = False  # take requests, give no tokens
    is_silent: bool = False  # answer nothing at all
    refusal: Finish | None = None  # how every new request ends at once
    meta: OutputMeta = field(default_factory=lambda: OutputMeta(prompt_tokens=0, weight_version="default"))
    flush: Callable[[FlushCache], FlushResult | None] | None = None  # None: never answers
    answers: dict[type, Callable[[Any], Any]] = field(default_factory=dict)  # by message type; these come first
    operations: OperationList = field(default_factory=lambda: OperationList(call_id="", items=()))


class ScriptedEngine:
    """Binds `endpoint` and serves until `stop`; use it as a context manager. `received` holds every message."""

    def __init__(self, endpoint: str, *, ready: EngineReady = READY, script: Script | None = None) -> None:
        self.endpoint = endpoint
        self.ready = ready
        self.script = script or Script()
        self.received: list[Any] = []
        self.batch_sizes: list[int] = []  # of requests that came in one message
        self._running: dict[str, _Running] = {}
        self._is_stopping = False
        self._thread = threading.Thread(target=self._serve, name="scripted-engine", daemon=True)

    def __enter__(self) -> "ScriptedEngine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._is_stopping = True
        self._thread.join(timeout=60.0)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def of_type(self, kind: type[T]) -> list[T]:
        """Messages of one type received so far."""
        return [message for message in list(self.received) if isinstance(message, kind)]

    def wait_for(self, kind: type[T], *, count: int = 1, timeout_s: float = 20.0) -> list[T]:
        """Wait until `count` messages of a type have come. Raises TimeoutError."""
        deadline_s = time.monotonic() + timeout_s
        while len(found := self.of_type(kind)) < count:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{count} {kind.__name__} expected, got {found}")
            time.sleep(0.002)
        return found

    # --- the engine's thread -----------------------------------------------------------------------

    def _serve(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.bind(self.endpoint)
        try:
            while not self._is_stopping:
                while socket.poll(0 if self._has_work else POLL_MS):
                    client, frame = socket.recv_multipart()
                    self._take(socket, client, decode_to_engine(frame))
                if self._has_work:
                    self._step(socket)
                    time.sleep(self.script.step_s)
        finally:
            socket.close()
            context.term()

    @property
    def _has_work(self) -> bool:
        return bool(self._running) and not self.script.is_stalled

    def _take(self, socket: zmq.Socket, client: bytes, message: Any) -> None:
        if isinstance(message, GenerateBatch):
            self.batch_sizes.append(len(message.items))
            for request in message.items:
                self._take(socket, client, request)
            return
        self.received.append(message)
        if self.script.is_silent:
            return
        if isinstance(message, Generate):
            self._start(socket, client, message)
            return
        if isinstance(message, Abort):
            self._abort(socket, message)
        answer = self._answer(message)
        if answer is not None:
            socket.send_multipart((client, encode(answer)))

    def _answer(self, message: Any) -> Any:
        call_id = message.call_id
        if type(message) in self.script.answers:
            return self.script.answers[type(message)](message)
        match message:
            case Hello():
                fields = {name: getattr(self.ready, name) for name in self.ready.__struct_fields__}
                return EngineReady(**(fields | {"call_id": call_id}))
            case GetState():
                return self._state(call_id)
            case GetOperations():
                return OperationList(call_id=call_id, items=self.script.operations.items)
            case FlushCache():
                return self._flush(message)
            case PauseGeneration():
                return PauseResult(call_id=call_id, paused=True, num_requests=len(self._running))
            case SetWeightVersion():
                version = message.weight_version
                return WeightVersionSet(call_id=call_id, weight_version=version, num_aborted=0)
            case Shutdown():
                self._is_stopping = True
        return Done(call_id=call_id)

    def _flush(self, message: FlushCache) -> Any:
        if self.script.flush is not None:
            return self.script.flush(message)
        if self._running:
            return Failed(
                call_id=message.call_id,
                status=400,
                message="Flush cache failed.",
                blockers={"running": len(self._running)},
            )
        return FlushResult(
            call_id=message.call_id,
            status=200,
            success=True,
            message="Cache flushed.",
            mode=message.mode,
            waited_s=0.0,
            generation=1,
        )

    def _start(self, socket: zmq.Socket, client: bytes, request: Generate) -> None:
        running = _Running(client, request, self.script.reply(request))
        if self.script.refusal is not None:
            self._send(socket, running, (), self.script.refusal)
        elif request.sampling.max_new_tokens == 0:
            self._send(socket, running, (), Finish(type="length"))
        else:
            self._running[request.rid] = running

    def _abort(self, socket: zmq.Socket, message: Abort) -> None:
        for rid, running in list(self._running.items()):
            is_meant = message.match == "all" or rid == message.rid
            if is_meant or (message.match == "prefix" and rid.startswith(message.rid)):
                del self._running[rid]
                self._send(socket, running, (), Finish(type="abort", message=message.message))

    def _step(self, socket: zmq.Socket) -> None:
        """One token for every running request, one message for each client."""
        outputs: dict[bytes, list[Output]] = {}
        for rid, running in list(self._running.items()):
            token_id = next(running.tokens)
            sampling = running.request.sampling
            stops = sampling.stop_token_ids + (() if sampling.ignore_eos else self.ready.eos_token_ids)
            finish = None
            if token_id in stops:
                finish = Finish(type="stop", matched=token_id)
            elif running.num_outputs + 1 >= sampling.max_new_tokens:
                finish = Finish(type="length")
            outputs.setdefault(running.client, []).append(self._output(running, (token_id,), finish))
            if finish is not None:
                del self._running[rid]
        for client, items in outputs.items():
            socket.send_multipart((client, encode(Outputs(items=tuple(items)))))

    def _send(self, socket: zmq.Socket, running: _Running, tokens: tuple[int, ...], finish: Finish) -> None:
        items = (self._output(running, tokens, finish),)
        socket.send_multipart((running.client, encode(Outputs(items=items))))

    def _output(self, running: _Running, tokens: tuple[int, ...], finish: Finish | None) -> Output:
        request, is_first = running.request, running.num_outputs == 0
        running.num_outputs += len(tokens)
        asked = request.logprobs
        prompt_logprobs = None
        if asked is not None and asked.prompt_start >= 0 and is_first:
            ids = unpack_ids(request.prompt_ids).tolist()
            every = [_logprob(token, asked, is_first=place == 0) for place, token in enumerate(ids)]
            prompt_logprobs = tuple(every[asked.prompt_start :])
        return Output(
            rid=request.rid,
            token_ids=tokens,
            logprobs=tuple(_logprob(token, asked) for token in tokens) if asked else None,
            prompt_logprobs=prompt_logprobs,
            finish=finish,
            meta=self.script.meta if is_first or finish else None,
        )

    def _state(self, call_id: str) -> EngineState:
        num_pages = self.ready.num_pages
        device = TierState(
            capacity=num_pages,
            free=num_pages - 3,
            tree=2,
            private=1,
            retired=0,
            transfer=0,
            evictable=2,
            page_bytes=self.ready.page_bytes,
        )
        return EngineState(
            call_id=call_id,
            num_running=len(self._running),
            num_waiting=0,
            num_retracted=0,
            num_paused=0,
            paused=False,
            blockers={"running": len(self._running)} if self._running else {},
            tiers={"device": device},
            generation=1,
            weights_id=self.ready.weights_id,
            weight_version=self.ready.weight_version,
            page_size=self.ready.page_size,
            gen_throughput=0.0,
            uptime_s=1.0,
            counters={"prompt_tokens": 10.0, "evicted_tokens": 4.0},
            max_running=self.ready.max_running,
            max_total_tokens=num_pages * self.ready.page_size,
            memory_bytes={"weights": 1 << 20, "kv_cache": 1 << 20},
        )


def _logprob(token_id: int, asked: LogprobParams, *, is_first: bool = False) -> TokenLogprob:
    """Log-probabilities that depend on the token alone: -id / 100."""
    if is_first:
        return TokenLogprob(token_id=token_id, logprob=None)
    top_ids = tuple(range(1, asked.top + 1))
    return TokenLogprob(
        token_id=token_id,
        logprob=-token_id / 100,
        top_ids=top_ids,
        top_logprobs=tuple(-top_id / 100 for top_id in top_ids),
        ids_logprobs=tuple(-wanted / 100 for wanted in asked.token_ids),
    )
