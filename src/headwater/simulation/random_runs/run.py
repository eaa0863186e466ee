"""Plays runs, and reports broken promises."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from headwater.messages.base import pack_ids, unpack_ids
from headwater.messages.control import ContinueGeneration, FlushCache
from headwater.messages.generation import Generate, GenerateBatch
from headwater.messages.weights import ResumeMemory
from headwater.messages.wire import ToEngine
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.driver import Driver
from headwater.simulation.engine_shape import EngineShape
from headwater.simulation.fakes.shared_world import SharedWorld
from headwater.simulation.fakes.store import StoreFaults, UnreliableStore
from headwater.simulation.fakes.store_media import open_medium
from headwater.simulation.random_runs.events import ComeBack, Crash, Deliver, Event, Faults, FollowUp, Trace, Turns
from headwater.simulation.random_runs.profiles import Profile
from headwater.simulation.random_runs.workload import Workload

AUDIT_EVERY = 8  # in turns; all other checks run every turn
_LAST_TURNS = 5000  # within which everything must end without faults
_MAX_STALL = 10  # turns for which requests may wait without a reason
_LAST_CLIENT = b"last"


@dataclass(frozen=True, slots=True)
class Failure:
    """A broken promise, with the run that repeats it."""

    promise: str
    message: str
    turn: int
    trace: Trace


@dataclass(frozen=True, slots=True)
class RunResult:
    """The figures of one run. `failure` is None if every promise was kept."""

    seed: int
    num_turns: int
    num_requests: int
    num_calls: int
    num_pages_reused: int
    failure: Failure | None


class RandomRun:
    """A run's engines, their shared store, and the events so far."""

    def __init__(self, trace: Trace, *, audit_every: int = AUDIT_EVERY) -> None:
        self.trace = trace
        self.world = SharedWorld()
        self.num_turns = 0
        self.num_calls = 0
        self.num_requests = 0
        self.store: UnreliableStore | None = None
        if trace.store_bytes:
            medium = open_medium(trace.store_kind, capacity_bytes=trace.store_bytes)
            self.store = UnreliableStore(medium, seed=trace.seed)
        self._audit_every = audit_every
        self._faults = Faults()
        self._num_reused_before = 0  # in pages, by engines that have died
        self.engines = [self._start(shape) for shape in trace.shapes]

    def play(self, event: Event) -> None:
        """Apply `event`. Raises `Violation`."""
        match event:
            case Turns():
                for _ in range(event.count):
                    self._turn(event.advance_s)
            case Deliver():
                self._deliver(event.message, event.client, event.engine)
            case FollowUp():
                prompt = self._conversation(event.parent) + unpack_ids(event.message.prompt_ids).tolist()
                message = msgspec.structs.replace(event.message, prompt_ids=pack_ids(prompt))
                self._deliver(message, event.client, event.engine)
            case Faults():
                self._set_faults(event)
            case ComeBack():
                self._come_back()
            case Crash():
                self._restart(event.engine)

    def finish(self) -> None:
        """Turn off faults and check that every request, call and copy ends, and that all pages are freed."""
        self._set_faults(Faults())
        for engine in self.engines:
            engine.send(ContinueGeneration(call_id="last-continue"), client=_LAST_CLIENT)
            engine.send(ResumeMemory(call_id="last-resume"), client=_LAST_CLIENT)
        for _ in range(4):  # pending operations may close admission again
            self._come_back()
            self._until(lambda engine: not engine.calls.pending)
        for engine in self.engines:
            for number in range(2):  # a pending release may have followed the first resume
                engine.send(ResumeMemory(call_id=f"last-resume-{number}"), client=_LAST_CLIENT)
            engine.send(ContinueGeneration(call_id="last-continue-0"), client=_LAST_CLIENT)
        self._until(lambda engine: not engine.oracle.active and not engine.calls.pending)
        for engine in self.engines:
            engine.send(FlushCache(call_id="last-flush", timeout_s=60.0), client=_LAST_CLIENT)  # ends pins as well
        self._until(lambda engine: not engine.calls.pending)
        self._turn(3600.0)
        self._turn(0.01)  # empty pins expire
        self._until(lambda engine: not engine.parts.blockers() and not engine.runner.open_steps)
        for engine in self.engines:
            engine.check_all_pages_back()
            demand(engine.parts.control.num_pending == 0, "answered_once", "an operation is left")

    def close(self) -> None:
        """Close the store, and delete its files."""
        if self.store is not None:
            self.store.close()

    @property
    def num_pages_reused(self) -> int:
        return self._num_reused_before + sum(engine.oracle.num_pages_reused for engine in self.engines)

    # ------------------------------------------------------------------------------------------------

    def _start(self, shape: EngineShape) -> Driver:
        engine = Driver(shape, world=self.world, audit_every=self._audit_every, backend=self.store)
        engine.engine.store = self.store
        return engine

    def _restart(self, index: int) -> None:
        """Replace an engine by a new one. The old engine's pages in the store stay."""
        old = self.engines[index]
        self._num_reused_before += old.oracle.num_pages_reused
        self.engines[index] = self._start(old.shape)
        self._set_faults(self._faults)

    def _turn(self, advance_s: float) -> None:
        self.num_turns += 1
        for engine in self.engines:
            engine.turn()
            engine.clock.advance(advance_s)

    def _until(self, is_reached: Callable[[Driver], bool]) -> None:
        stalls = [0] * len(self.engines)  # consecutive turns in which an engine has work but does nothing
        for _ in range(_LAST_TURNS):
            if all(is_reached(engine) for engine in self.engines):
                return
            num_steps = [engine.runner.num_steps for engine in self.engines]
            self._turn(0.02)
            for index, engine in enumerate(self.engines):
                has_moved = engine.runner.num_steps > num_steps[index] or not engine.oracle.active
                stalls[index] = 0 if has_moved or engine.is_waiting else stalls[index] + 1
                text = f"without faults, requests wait for {stalls[index]} turns: {list(engine.oracle.active)[:5]}"
                demand(stalls[index] < _MAX_STALL, "progress", text)
        states = [(e.parts.blockers(), list(e.calls.pending), list(e.oracle.active)[:5]) for e in self.engines]
        raise Violation("progress", f"without faults, {_LAST_TURNS} turns are not enough: {states}")

    def _deliver(self, message: ToEngine, client: str, engine: int) -> None:
        match message:
            case Generate():
                self.num_requests += 1
            case GenerateBatch():
                self.num_requests += len(message.items)
            case _:
                self.num_calls += 1
        self.engines[engine].send(message, client=client.encode())

    def _conversation(self, parent: str) -> list[int]:
        """Prompt and text of a request so far; empty if it was never sent, in a shortened run."""
        for engine in self.engines:
            if parent in engine.answers:
                return engine.prompts[parent] + engine.answers[parent].tokens
        return []

    def _set_faults(self, faults: Faults) -> None:
        self._faults = faults
        for engine in self.engines:
            if engine.shape.num_host_pages:
                engine.copier.max_polls = faults.copy_polls
                engine.copier.failure_rate = faults.copy_failures
                engine.copier.hang_rate = faults.copy_hangs
            for jobs in (engine.jobs, engine.engine.grammar_jobs):
                jobs.max_polls = faults.job_polls
                jobs.hang_rate = faults.job_hangs
            engine.runner.weights.num_polls = faults.staging_polls
            engine.runner.fault_rate = faults.step_faults
            engine.runner.not_finite_rate = faults.not_finite
        if self.store is not None:
            self.store.faults = StoreFaults(
                fails=faults.store_fails,
                writes_late=faults.store_writes_late,
                flips=faults.store_flips,
                full=faults.store_full,
                is_read_only=faults.store_is_read_only,
                truncates=faults.store_truncates,
                loses=faults.store_loses,
            )

    def _come_back(self) -> None:
        for engine in self.engines:
            engine.jobs.release_hanging()
            engine.engine.grammar_jobs.release_hanging()
        if self.store is not None:
            self.store.land_late_writes()


def random_run(
    seed: int, *, profile: Profile, num_turns: int, on_turns: Callable[[int], None] | None = None
) -> RunResult:
    """Play a random run of about `num_turns` turns. `on_turns` gets the size of each batch of turns."""
    workload = Workload(seed, profile)
    header = Trace(seed, profile.name, workload.shapes, workload.store_bytes, (), store_kind=profile.store_kind)
    return _play(header, workload.events(), num_turns=num_turns, on_turns=on_turns)


def replay(trace: Trace) -> RunResult:
    """Play a run again, event by event."""
    return _play(trace, trace.events, num_turns=None, on_turns=None)


def _play(
    header: Trace, events: Iterable[Event], *, num_turns: int | None, on_turns: Callable[[int], None] | None
) -> RunResult:
    run = RandomRun(header)
    played: list[Event] = []
    failure = None
    try:
        for event in events:
            if num_turns is not None and run.num_turns >= num_turns:
                break
            before = run.num_turns
            played.append(event)
            run.play(event)
            if on_turns is not None and run.num_turns > before:
                on_turns(run.num_turns - before)
        run.finish()
    except Violation as violation:
        trace = msgspec.structs.replace(header, events=tuple(played))
        failure = Failure(violation.promise, str(violation), run.num_turns, trace)
    finally:
        run.close()
    return RunResult(
        seed=header.seed,
        num_turns=run.num_turns,
        num_requests=run.num_requests,
        num_calls=run.num_calls,
        num_pages_reused=run.num_pages_reused,
        failure=failure,
    )
