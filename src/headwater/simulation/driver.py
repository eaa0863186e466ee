"""Turns a simulated engine for a test: sends its messages, collects its answers, and checks every turn."""

from dataclasses import dataclass, field
from typing import Any

from headwater.cache.storage.tier import StorageSettings
from headwater.messages.base import pack_ids, unpack_ids
from headwater.messages.cache import PinGaveWay
from headwater.messages.generation import (
    Abort,
    Finish,
    Generate,
    GenerateBatch,
    Grammar,
    LogprobParams,
    Output,
    OutputMeta,
    Outputs,
    RequestOptions,
    SamplingParams,
    TokenLogprob,
)
from headwater.messages.weights import SetWeightVersion
from headwater.messages.wire import ToClient, ToEngine
from headwater.simulation.checks.engine_checks import EngineChecks
from headwater.simulation.checks.violation import Violation
from headwater.simulation.engine_shape import EngineShape
from headwater.simulation.fakes.copier import FakeCopier
from headwater.simulation.fakes.runner import StepFault
from headwater.simulation.fakes.shared_world import SharedWorld
from headwater.simulation.simulated_engine import SimulatedEngine
from headwater.storage.backend import StorageBackend

CLIENT = b"client"


@dataclass
class GeneratedAnswer:
    """The output of one request so far."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    meta: OutputMeta | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, output: Output) -> None:
        self.tokens += output.token_ids
        self.logprobs += output.logprobs or ()
        self.prompt_logprobs += output.prompt_logprobs or ()
        self.finish = output.finish
        self.meta = output.meta or self.meta


class Driver:
    """A simulated engine for a test, and checks of every read, answer and deadline; see docs/reliability.md.

    `turn` raises `Violation`. The cache's books are audited page by page every `audit_every` turns; all other checks
    run every turn.
    """

    def __init__(
        self,
        shape: EngineShape | None = None,
        *,
        world: SharedWorld | None = None,
        backend: StorageBackend | None = None,
        storage_settings: StorageSettings | None = None,
        audit_every: int = 1,
    ) -> None:
        self.shape = shape or EngineShape()
        self.world = world or SharedWorld()
        self.answers: dict[str, GeneratedAnswer] = {}
        self.prompts: dict[str, list[int]] = {}
        self.replies: dict[str, ToClient] = {}
        self.engine = engine = SimulatedEngine(self.shape, self.world, storage_settings)
        self.clock, self.wire, self.parts = engine.clock, engine.wire, engine.parts
        self.runner, self.jobs = engine.runner, engine.jobs
        self._checks = EngineChecks(engine, audit_every=audit_every)
        self.oracle, self.calls = self._checks.oracle, self._checks.calls
        if backend is not None:
            engine.attach(backend)

    @property
    def copier(self) -> FakeCopier:
        assert self.engine.copier is not None, "an engine without host pages copies nothing"
        return self.engine.copier

    def attach(self, backend: StorageBackend) -> None:
        self.engine.attach(backend)

    def send(self, message: ToEngine, *, client: bytes = CLIENT) -> None:
        """Queue a message for the engine's next turn.

        A request whose rid is in use is dropped if the same turn ends the earlier request of that name: its client
        could not attribute the outputs.
        """
        if isinstance(message, Generate | GenerateBatch):
            items = message.items if isinstance(message, GenerateBatch) else (message,)
            items = tuple(item for item in items if not self._is_ambiguous(client, item.rid))
            if not items:
                return
            for item in items:
                self.answers.setdefault(item.rid, GeneratedAnswer())
                self.prompts.setdefault(item.rid, unpack_ids(item.prompt_ids).tolist())
                self.oracle.sent(client, item)
            message = GenerateBatch(items=items) if isinstance(message, GenerateBatch) else message
        self.wire.inbound.append((client, message))

    def _is_ambiguous(self, client: bytes, rid: str) -> bool:
        is_used = (client, rid) in self.oracle.active
        return is_used and any(_may_end(other, rid) for _, other in self.wire.inbound)

    def generate(
        self,
        rid: str,
        prompt: list[int],
        num_tokens: int = 8,
        *,
        logprobs: LogprobParams | None = None,
        output_interval: int = 1,
        grammar: Grammar | None = None,
        **fields: Any,
    ) -> GeneratedAnswer:
        """Send a request; turns fill its answer. `fields` are those of RequestOptions and SamplingParams."""
        options = {name: fields.pop(name) for name in RequestOptions.__struct_fields__ if name in fields}
        self.send(
            Generate(
                rid=rid,
                prompt_ids=pack_ids(prompt),
                sampling=SamplingParams(max_new_tokens=num_tokens, **fields),
                logprobs=logprobs,
                options=RequestOptions(**options),
                grammar=grammar,
                output_interval=output_interval,
            )
        )
        return self.answers[rid]

    def turn(self, count: int = 1) -> None:
        """Turn the loop `count` times and check each turn. Raises `Violation`."""
        for _ in range(count):
            self.world.turn += 1
            num_steps = self.runner.num_steps
            try:
                self.parts.loop.turn()
            except Violation:
                raise
            except AssertionError as error:
                raise Violation("engine_asserts", str(error)) from error
            except Exception as error:  # any error would end the loop, and with it the server
                raise Violation("engine_raises", f"{type(error).__name__}: {error}") from error
            self._check_survived()
            self._read()
            self._checks.end_turn(has_launched=self.runner.num_steps > num_steps)
            if self.engine.ranks is not None:
                self.engine.ranks.check_books(self.parts.cache)

    def _check_survived(self) -> None:
        """The loop survives errors of steps and messages; raise those that were not injected."""
        survived = self.parts.loop.survived
        if not survived:
            return
        for error in survived:
            if isinstance(error, Violation):
                raise error
            if not isinstance(error, StepFault):
                promise = "engine_asserts" if isinstance(error, AssertionError) else "engine_raises"
                raise Violation(promise, f"{type(error).__name__}: {error}") from error
        survived.clear()

    def finish(self, *answers: GeneratedAnswer, max_turns: int = 2000) -> None:
        """Turn until all `answers` (default: of all requests) are complete. Raises `Violation` if they never are."""
        wanted = answers or tuple(self.answers.values())
        for _ in range(max_turns):
            if all(answer.finish for answer in wanted):
                return
            self.turn()
        raise Violation("progress", f"not finished after {max_turns} turns")

    def settle(self, *, max_turns: int = 100_000) -> None:
        """Turn until no copy is in flight."""
        self.turn(3)
        for _ in range(max_turns):
            if not self.parts.cache.lower.in_flight():
                return
            self.turn()
        raise Violation("progress", f"copies are in flight after {max_turns} turns")

    @property
    def is_waiting(self) -> bool:
        """Whether a call, a copy, a compilation or a job of the store is open, for which requests may have to wait."""
        is_copying = self.shape.num_host_pages > 0 and bool(self.copier.open_copies)
        has_jobs = self.jobs.open_jobs or self.engine.grammar_jobs.open_jobs
        return bool(self.calls.pending or has_jobs) or is_copying

    def check_all_pages_back(self) -> None:
        self._checks.promises.check_drained()

    def _read(self) -> None:
        sent, self.wire.sent = self.wire.sent, []
        for client, message in sent:
            if isinstance(message, Outputs):
                for output in message.items:
                    self.oracle.received(client, output)
                    self._checks.sums.received(output)
                    self.answers[output.rid].take(output)
            elif isinstance(message, PinGaveWay):
                self._checks.pins.noticed(client, message)
            else:
                self._checks.answered(client, message)
                self.replies[message.call_id] = message


def _may_end(message: ToEngine, rid: str) -> bool:
    """Whether `message` makes the engine end a request with this name immediately."""
    match message:
        case Abort():
            return message.match == "all" or rid.startswith(message.rid)
        case SetWeightVersion():
            return message.abort_all_requests is not False
    return False
