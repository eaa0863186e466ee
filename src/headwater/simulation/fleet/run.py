"""Random runs of a server with several engines: changes, requests, silence, crashes, late answers, lost files."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.messages.base import pack_ids
from headwater.messages.cache import AttachStorage, DetachStorage
from headwater.messages.control import ContinueGeneration, PauseGeneration
from headwater.messages.generation import Generate, SamplingParams
from headwater.messages.weights import ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights
from headwater.simulation.checks.violation import Violation
from headwater.simulation.fleet.promises import FleetPromises
from headwater.simulation.fleet.server import FleetServer

FIRST_WITH_ADAPTERS = 500  # seed; runs of the seeds below have no LoRA adapters, and stay as they were
HEAL_S = 40.0  # for everything to end after all engines are back


@dataclass(frozen=True, slots=True)
class FleetFailure:
    promise: str
    message: str
    turn: int


@dataclass(frozen=True, slots=True)
class FleetRunResult:
    """The figures of one run. `failure` is None if every promise was kept."""

    seed: int
    num_turns: int
    num_changes: int
    num_decided: int
    num_requests: int
    num_deaths: int
    failure: FleetFailure | None


def fleet_run(
    seed: int,
    *,
    num_turns: int,
    on_turns: Callable[[int], None] | None = None,
    kind: "Callable[[int], FleetRun] | None" = None,
) -> FleetRunResult:
    """Run `num_turns` turns with faults, then heal all faults and check the end. A seed determines the run.

    `kind`: makes a run with more in it.
    """
    run = (kind or FleetRun)(seed)
    failure = None
    try:
        run.play(num_turns)
        run.heal()
    except Violation as violation:
        failure = FleetFailure(violation.promise, str(violation), run.server.num_turns)
    except Exception as error:  # noqa: BLE001  any error would end the server
        failure = FleetFailure("fleet_raises", f"{type(error).__name__}: {error}", run.server.num_turns)
    if on_turns is not None:
        on_turns(run.server.num_turns)
    asked = run.server.asked
    return FleetRunResult(
        seed=seed,
        num_turns=run.server.num_turns,
        num_changes=len(asked),
        num_decided=sum(each.is_reported_done for each in asked),
        num_requests=len(run.server.sent),
        num_deaths=run.num_deaths,
        failure=failure,
    )


class FleetRun:
    """One run; its seed determines all random choices."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
        self.server = FleetServer(seed, num_engines=self._source.choice([1, 2, 2, 2, 3]))
        self.promises = FleetPromises(self.server)
        self.num_deaths = 0
        self._trouble = self._source.choice([0.0, 0.5, 1.0])  # how many faults this run has
        self.server.max_delay_s = self._source.choice([0.0, 0.05, 0.3])
        self._changes = [
            self._update, self._update, self._label, self._pause, self._continue, self._release, self._resume,
            self._attach, self._detach,
        ]  # fmt: skip
        if seed >= FIRST_WITH_ADAPTERS:
            self._changes += [self._load_adapter, self._load_adapter, self._unload_adapter]

    def play(self, num_turns: int) -> None:
        while self.server.num_turns < num_turns:
            self._happen()
            self._turn()

    def heal(self) -> None:
        """Restore files, start silent and dead engines, and finally resume everything."""
        server = self.server
        server.disk.gone.clear()
        server.disk.torn.clear()
        server.max_delay_s = 0.0
        for place in server.places:
            place.silent_until_s = 0.0
            if place.engine is None:
                server.start(place.index)
        self._settle()
        self.promises.check_end()
        for change in (ResumeMemory(call_id=server.new_name()), ContinueGeneration(call_id=server.new_name())):
            server.ask(change, timeout_s=10.0)
        self._settle()
        self.promises.check_end()

    def _settle(self) -> None:
        until_s = self.server.clock.now() + HEAL_S
        while self.server.clock.now() < until_s:
            self._turn()
            if not self.server.is_busy:
                break

    def _turn(self) -> None:
        self.server.turn()
        self.promises.check()

    # --- events -------------------------------------------------------------------------------------

    def _happen(self) -> None:
        chance, source = self._source.random(), self._source
        if chance < 0.10:
            self._request()
        elif chance < 0.16:
            timeout_s = source.choice([0.0, 0.3, 1.0, 5.0, 30.0])
            change = source.choice(self._changes)()
            self.server.ask(change, timeout_s=timeout_s)
        elif chance < 0.165:
            waiting = [asked for asked in self.server.asked[-3:] if asked.answered_s is None and not asked.is_abandoned]
            if waiting:
                self.server.abandon(source.choice(waiting))
        elif chance < 0.165 + 0.02 * self._trouble:
            self._fall_silent()
        elif 0.2 < chance < 0.23:
            self._die_or_return(source.choice(self.server.places).index)
        elif chance > 0.995:
            self._touch_files()

    def _request(self) -> None:
        length = self._source.randint(1, 40)
        prompt = [self._source.randrange(900) for _ in range(length)]
        sampling = SamplingParams(max_new_tokens=self._source.randint(1, 20))
        sent = self.server.send(Generate(rid=self.server.new_name("r"), prompt_ids=pack_ids(prompt), sampling=sampling))
        if sent is not None:
            self.promises.check_routed(sent)

    def _fall_silent(self) -> None:
        """Silence an engine for a while, often one that has made a change and not answered yet."""
        places = [place for place in self.server.places if place.outbound] or self.server.places
        lasts_s = self._source.choice([0.1, 0.5, 1.5, 4.0])
        self._source.choice(places).silent_until_s = self.server.clock.now() + lasts_s

    def _die_or_return(self, index: int) -> None:
        if self.server.places[index].engine is None:
            self.server.start(index, load_s=self._source.choice([0.0, 1.0]))
        elif self._source.random() < 0.2 * self._trouble:
            self.num_deaths += 1
            self.server.kill(index)

    def _touch_files(self) -> None:
        """Remove a checkpoint, or overwrite it while engines read it; later it is whole again."""
        disk, updates = self.server.disk, [a.change for a in self.server.asked if isinstance(a.change, UpdateWeights)]
        if disk.gone or disk.torn or not updates:
            disk.gone.clear()
            disk.torn.clear()
        else:
            disk.gone.add(updates[-1].path)
            desired = self.server.fleet.desired
            if desired is not None and self._source.random() < 0.5:  # the files of the present weights
                disk.torn.add(desired.weights[-1].path)

    # --- changes ------------------------------------------------------------------------------------

    def _update(self) -> Any:
        path = self.server.new_name("corrupt" if self._source.random() < 0.1 else "w")
        if self._source.random() < 0.1 and len(self.server.fleet.candidates()) > 1:
            self.server.disk.torn.add(path)
        label = self.server.new_name("v") if self._source.random() < 0.6 else None
        abort = self._source.random() < 0.3
        return UpdateWeights(
            call_id=self.server.new_name(), path=path, weight_version=label, abort_all_requests=abort, timeout_s=30.0
        )

    def _load_adapter(self) -> Any:
        path = self.server.new_name("corrupt" if self._source.random() < 0.1 else "a")
        name = self._source.choice(["one", "two"])
        return LoadAdapter(call_id=self.server.new_name(), name=name, path=path, load_inplace=True, timeout_s=30.0)

    def _unload_adapter(self) -> Any:
        return UnloadAdapter(call_id=self.server.new_name(), name=self._source.choice(["one", "two"]))

    def _label(self) -> Any:
        return SetWeightVersion(call_id=self.server.new_name(), weight_version=self.server.new_name("v"))

    def _pause(self) -> Any:
        mode: Any = self._source.choice(["abort", "retract", "in_place"])
        return PauseGeneration(call_id=self.server.new_name(), mode=mode)

    def _continue(self) -> Any:
        return ContinueGeneration(call_id=self.server.new_name())

    def _release(self) -> Any:
        tags = self._source.choice([(), ("kv_cache",), ("weights",)])
        return ReleaseMemory(call_id=self.server.new_name(), tags=tags, timeout_s=self._source.choice([0.0, 5.0]))

    def _resume(self) -> Any:
        return ResumeMemory(call_id=self.server.new_name(), timeout_s=30.0)

    def _attach(self) -> Any:
        broken = "broken" if self._source.random() < 0.2 else None
        name = self.server.new_name("s")
        return AttachStorage(
            call_id=self.server.new_name(),
            kind="memory",
            directory=broken,
            url=name,
            size_bytes=1 << 16,
            timeout_s=30.0,
        )

    def _detach(self) -> Any:
        return DetachStorage(call_id=self.server.new_name())
