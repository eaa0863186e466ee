"""Real engine loops in threads, behind real sockets; only the model is a fake whose text shows every wrong page."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq
from api_under_test import ENGINE_READY, TOKENIZER

from headwater.cache.host_tier import HostTier, WritePolicy
from headwater.clock import MonotonicClock
from headwater.engine.wire import ZmqWire
from headwater.engine.wiring import wire_engine
from headwater.messages.state import Ping
from headwater.messages.wire import encode
from headwater.scheduling.limits import SchedulerLimits
from headwater.simulation.fakes.canary import expected_tokens
from headwater.simulation.fakes.copier import FakeCopier
from headwater.simulation.fakes.kv_records import HostRecords
from headwater.simulation.fakes.runner import FakeRunner

PAGE_SIZE = 4
VOCAB_SIZE = TOKENIZER.vocab_size


class PacedRunner(FakeRunner):
    """A fake runner whose steps take time, so that tests meet an engine at work."""

    step_s = 0.0

    def launch(self, plan: Any) -> Any:
        if self.step_s:
            time.sleep(self.step_s)
        return super().launch(plan)


class FreezableWire(ZmqWire):
    """A wire whose engine can be stopped as SIGSTOP stops one: it reads nothing and says nothing until it goes on."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def receive(self, *, wait_s: float) -> list[tuple[bytes, Any]]:
        received = super().receive(wait_s=min(wait_s, 0.02))
        if not self.may_go_on.is_set():
            self.may_go_on.wait()
        return received


class LoopEngine:
    """One engine; a context manager. `step_s` may be changed while it runs, `parts` is what it is made of."""

    def __init__(
        self,
        endpoint: str,
        *,
        num_pages: int = 256,
        num_host_pages: int = 0,
        max_running: int = 8,
        max_queued: int = 1000,
        max_context: int = 400,
        max_step_tokens: int = 128,
        prefill_chunk_tokens: int = 64,
        limits: dict[str, Any] | None = None,
    ) -> None:
        self.endpoint = endpoint
        ready = msgspec.structs.replace(
            ENGINE_READY,
            max_context=max_context,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            eos_token_ids=(),
            max_running=max_running,
        )
        self.runner = PacedRunner(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            max_running=max_running,
            vocab_size=VOCAB_SIZE,
            max_context=max_context,
        )
        self._wire = FreezableWire(endpoint)
        self.parts = wire_engine(
            wire=self._wire,
            runner=self.runner,
            ready=ready,
            limits=SchedulerLimits(
                max_running=max_running,
                max_step_tokens=max_step_tokens,
                prefill_chunk_tokens=prefill_chunk_tokens,
                max_queued=max_queued,
                max_context=max_context,
                **(limits or {}),
            ),
            clock=MonotonicClock(),
            host=self._host(num_host_pages) if num_host_pages else None,
        )
        self._thread = threading.Thread(target=self.parts.loop.run, daemon=True)

    def _host(self, num_pages: int) -> HostTier:
        copier = FakeCopier(self.runner.kv, num_host_pages=num_pages)
        copier.turn = lambda: 1
        self.runner.wait_for_restores = copier.wait
        return HostTier(
            num_pages=num_pages,
            copier=copier,
            pages=HostRecords(copier.host),
            policy=WritePolicy.WRITE_THROUGH,
            min_restore_tokens=PAGE_SIZE,
        )

    def freeze(self) -> None:
        self._wire.may_go_on.clear()
        time.sleep(0.05)  # a turn that had begun ends

    def thaw(self) -> None:
        self._wire.may_go_on.set()

    @property
    def step_s(self) -> float:
        return self.runner.step_s

    @step_s.setter
    def step_s(self, seconds: float) -> None:
        self.runner.step_s = seconds

    def __enter__(self) -> "LoopEngine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.step_s = 0.0
        self.thaw()
        self.parts.loop.stop()
        with zmq.Context() as context, context.socket(zmq.DEALER) as waker:
            waker.linger = 0  # the loop may be gone already: nobody would ever take the message
            waker.connect(self.endpoint)
            waker.send(encode(Ping(call_id="wake up")))
            self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the loop did not end"
        self._wire.close()


@contextlib.contextmanager
def loop_engines(folder: Path, count: int = 1, **settings: Any) -> Iterator[list[LoopEngine]]:
    """Several engines with the same settings."""
    with contextlib.ExitStack() as stack:
        names = [f"ipc://{folder}/engine-{index}.sock" for index in range(count)]
        yield [stack.enter_context(LoopEngine(name, **settings)) for name in names]


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    """The only right answer to a prompt, whatever was cached, shared or flushed on the way."""
    return expected_tokens(prompt, num_tokens, VOCAB_SIZE)


def prompt_of(name: int, num_tokens: int = 40) -> list[int]:
    """Token ids that share no page with the prompt of another name."""
    return [2 + (name * 97 + position * 31) % 250 for position in range(num_tokens)]
