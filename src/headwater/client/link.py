"""The connection to one engine: a DEALER socket, its reader, and the requests and calls on it."""

import asyncio
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq

from headwater.client.change_call import ANSWER_GRACE_S, EXPIRY_GRACE_S
from headwater.client.errors import CallFailed, EngineGone, RidInUse
from headwater.client.generation import Generation
from headwater.messages.base import Call, DeferredCall
from headwater.messages.cache import PinGaveWay
from headwater.messages.control import CancelOperation, Failed
from headwater.messages.generation import Abort, Generate, GenerateBatch, Outputs
from headwater.messages.state import EngineReady, Hello
from headwater.messages.two_phase import answered_under
from headwater.messages.wire import decode_to_client, encode

log = logging.getLogger(__name__)

_READ_AT_ONCE = 64  # messages, before the event loop does other work
_POLLIN = int(zmq.POLLIN)
_MAX_HELD_BYTES = 16 << 20  # of prompts in one message, which both sides hold in memory

_process_tag = uuid.uuid4().hex[:12]  # the engine keys operations by call id: two API processes must differ
_call_numbers = itertools.count(1)


def new_call_id() -> str:
    """An id for a call, unique among all API processes of an engine."""
    return f"{_process_tag}-{next(_call_numbers)}"


class EngineLink:
    """Owns the socket to one engine, and the tables of requests and calls that wait for its answers.

    An entry leaves the table when the engine answers (for a generation: with its `finish`) or is gone; a
    generation whose consumer left stays until then, so that its late outputs cannot reach another request.
    Open it inside the running event loop.
    """

    def __init__(
        self,
        index: int,
        *,
        on_ready: Callable[[int, EngineReady], None] = lambda index, ready: None,
        on_answer: Callable[[int, Any], None] = lambda index, answer: None,
        on_pin_gave_way: Callable[[int, PinGaveWay], None] = lambda index, notice: None,
    ) -> None:
        """`on_ready`: the engine has loaded. `on_answer`: it answers a message that `post` sent."""
        self.index = index
        self._on_ready = on_ready
        self._on_answer = on_answer
        self._on_pin_gave_way = on_pin_gave_way
        self.ready: EngineReady | None = None
        self.last_heard_s = float("-inf")  # loop time of the newest message
        self._socket: zmq.Socket[bytes] | None = None
        self._generations: dict[str, Generation] = {}
        self._calls: dict[str, asyncio.Future[Any]] = {}
        self._held: list[Generate] | None = None  # inside `together`: not sent yet
        self._num_held_bytes = 0
        self._gone: EngineGone | None = EngineGone(index, "not connected yet")
        self._changed = asyncio.Event()

    # --- life --------------------------------------------------------------------------------------

    def open(self, endpoint: str, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        """Connect (the engine may bind later) and say Hello."""
        assert self._socket is None, "close a link before it is opened again"
        self._gone = None
        self._socket = context.socket(zmq.DEALER)
        self._socket.set_hwm(0)  # a send never blocks; the engine bounds its own queue
        self._socket.linger = 200
        self._socket.connect(endpoint)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)
        self._send(Hello(call_id=new_call_id()))

    def fail(self, error: EngineGone) -> None:
        """The engine is gone: end all requests and calls, and refuse new ones until `open`."""
        self._gone = error
        self.ready = None
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        generations, self._generations = self._generations, {}
        calls, self._calls = self._calls, {}
        for generation in generations.values():
            generation.fail(error)
        for future in calls.values():
            if not future.done():
                future.set_exception(error)
        self._announce_change()

    async def wait_ready(self) -> EngineReady:
        """Wait for the engine's EngineReady. Raises EngineGone if it ends before."""
        while self.ready is None:
            if self._gone is not None:
                raise self._gone
            await self._changed.wait()
        return self.ready

    @property
    def num_running(self) -> int:
        """Requests that the engine still has, including those whose client has left."""
        return len(self._generations)

    @property
    def gone(self) -> EngineGone | None:
        return self._gone

    @property
    def is_loading(self) -> bool:
        """Whether the engine is there but has not loaded its model yet."""
        return self._gone is None and self.ready is None

    # --- requests ----------------------------------------------------------------------------------

    def has_running(self, rid: str) -> bool:
        """Whether a client still reads the request `rid`."""
        generation = self._generations.get(rid)
        return generation is not None and not generation.is_closed

    def generate(self, request: Generate) -> Generation:
        """Send a request. Raises EngineGone, RidInUse."""
        if self._gone is not None:
            raise self._gone
        if self.has_running(request.rid):
            raise RidInUse(request.rid)
        if request.rid in self._generations:  # its client has left, the engine has not ended it yet
            request = msgspec.structs.replace(request, rid=f"{request.rid}~{next(_call_numbers)}")
        generation = Generation(request.rid, engine=self.index, on_close=self._leave)
        if self._held is None:
            self._send(request)
        else:
            self._hold(request)
        self._generations[request.rid] = generation
        return generation

    @contextmanager
    def together(self) -> Iterator[None]:
        """Requests that begin inside travel in one message, so that one step can begin with all. No `await` inside."""
        assert self._held is None, "held already"
        self._held = []
        try:
            yield
        finally:
            self._send_held()
            self._held = None

    def _hold(self, request: Generate) -> None:
        assert self._held is not None
        self._held.append(request)
        self._num_held_bytes += len(request.prompt_ids)
        if self._num_held_bytes >= _MAX_HELD_BYTES:
            self._send_held()

    def _send_held(self) -> None:
        held, self._held, self._num_held_bytes = self._held, [], 0
        if held and self._socket is not None:  # else the engine is gone, and they have failed
            self._put(held[0] if len(held) == 1 else GenerateBatch(items=tuple(held)))

    def _leave(self, generation: Generation) -> None:
        if not generation.has_ended and self._socket is not None:
            self._send(Abort(call_id=new_call_id(), rid=generation.rid, message="the client left"))

    # --- calls -------------------------------------------------------------------------------------

    async def call(self, message: Any, *, timeout_s: float | None = None) -> Any:
        """Send a message that has a call_id; its answer. Raises CallFailed, EngineGone, TimeoutError.

        The engine does nothing for it later than `timeout_s` plus EXPIRY_GRACE_S.
        """
        if self._gone is not None:
            raise self._gone
        if timeout_s is not None:
            deadline_s = asyncio.get_running_loop().time() + timeout_s
            message = msgspec.structs.replace(message, expires_at_s=deadline_s + EXPIRY_GRACE_S)
            timeout_s += ANSWER_GRACE_S
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        assert message.call_id not in self._calls, "call ids are unique"
        self._send(message)
        self._calls[message.call_id] = future
        try:
            async with asyncio.timeout(timeout_s):
                answer = await future
        except (asyncio.CancelledError, TimeoutError):
            if isinstance(message, DeferredCall) and self._socket is not None:
                self._send(CancelOperation(call_id=new_call_id(), started_by_call=message.call_id))
            raise
        finally:
            self._calls.pop(message.call_id, None)
        if isinstance(answer, Failed):
            raise CallFailed(answer)
        return answer

    async def relay(self, message: Call) -> Any:
        """The answer to a message that another process sent for this engine; `Failed` is returned, not raised.

        Leaving early cancels a deferred call. Raises EngineGone.
        """
        if self._gone is not None:
            raise self._gone
        answered_as = answered_under(message)
        if answered_as in self._calls:
            return Failed(call_id=answered_as, status=409, message="a call with this id is in progress")
        future = self._calls[answered_as] = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            return await future
        except asyncio.CancelledError:
            if isinstance(message, DeferredCall) and self._socket is not None:
                self._send(CancelOperation(call_id=new_call_id(), started_by_call=message.call_id))
            raise
        finally:
            self._calls.pop(answered_as, None)

    def post(self, message: Any) -> None:
        """Send a message whose answer goes to `on_answer`. An engine that is gone gets none."""
        if self._socket is not None:
            self._send(message)

    # --- the wire ----------------------------------------------------------------------------------

    def _send(self, message: Any) -> None:
        if self._held:
            self._send_held()  # an Abort must not overtake what it ends
        self._put(message)

    def _put(self, message: Any) -> None:
        assert self._socket is not None, "the link is open"
        self._socket.send(encode(message))  # without a high-water mark it is only queued
        asyncio.get_running_loop().call_soon(self._read)  # `send` may have taken the signal of a message that came

    def _read(self) -> None:
        """Take what has arrived. The socket's descriptor signals an arrival once, so nothing may be left unseen.

        A callback of the event loop, not a task that awaits each message: that took a third of an event's time.
        """
        for _ in range(_READ_AT_ONCE):
            if self._socket is None or not int(self._socket.get(zmq.EVENTS)) & _POLLIN:
                return
            frame = self._socket.recv(zmq.NOBLOCK)
            try:
                self._receive(frame)
            except msgspec.MsgspecError:
                log.exception("engine %d sent a message that cannot be read; it is dropped", self.index)
            except Exception:
                log.exception("a message of engine %d could not be handled", self.index)
        asyncio.get_running_loop().call_soon(self._read)

    def _receive(self, frame: bytes) -> None:
        self.last_heard_s = asyncio.get_running_loop().time()
        message = decode_to_client(frame)
        if isinstance(message, Outputs):
            self._deliver(message)
        elif isinstance(message, EngineReady):
            self.ready = message
            self._on_ready(self.index, message)
            self._announce_change()
        elif isinstance(message, PinGaveWay):
            self._on_pin_gave_way(self.index, message)
        else:
            self._answer(message)

    def _deliver(self, outputs: Outputs) -> None:
        for output in outputs.items:
            generation = self._generations.get(output.rid)
            if generation is None:
                log.debug("output for unknown rid %r dropped", output.rid)
                continue
            generation.put(output)
            if output.finish is not None:
                del self._generations[output.rid]

    def _answer(self, message: Any) -> None:
        future = self._calls.pop(message.call_id, None)
        if future is not None:
            if not future.done():
                future.set_result(message)
        elif isinstance(message, Failed) and message.call_id in self._generations:
            self._generations.pop(message.call_id).fail(CallFailed(message))
        else:  # to a posted message, or to a call whose caller has left
            self._on_answer(self.index, message)

    def _announce_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
