"""Random runs of a server with trainers that send tensors, beside everything that `FleetRun` does."""

import random
from collections import Counter

from headwater.simulation.checks.violation import demand
from headwater.simulation.fleet.run import FIRST_WITH_ADAPTERS, FleetRun
from headwater.simulation.fleet.server import DiskWeights
from headwater.simulation.fleet.trainers import Content, ReceivedWeights, SimulatedReceiver, Staging, Trainer
from headwater.transports.bracket import Phase

FIRST_WITH_MORE = FIRST_WITH_ADAPTERS  # seed; earlier runs have no flushes and hardly a caller who leaves at the swap


class DiskAndReceivedWeights(DiskWeights, ReceivedWeights):
    """Weights from files or from a trainer."""

    def __init__(self, staging: Staging, weights: DiskWeights) -> None:
        ReceivedWeights.__init__(self, staging, weights.current)
        self._disk, self._reader, self.num_polls = weights._disk, weights._reader, weights.num_polls


class TransferRun(FleetRun):
    """A run with two trainers, of which one alone would be right: they meet each other's brackets."""

    def __init__(self, seed: int) -> None:
        self._trainers_source = random.Random(seed + 10**6)
        self.staging = Staging()
        super().__init__(seed)
        self.server.wrap_weights = lambda weights: DiskAndReceivedWeights(self.staging, weights)
        for place in self.server.places:  # those that have started already
            self.server.start(place.index)
        server = self.server
        self.receiver = SimulatedReceiver(server.fleet, self.staging, server.ask, server.new_name)
        self.intended: list[Content] = []
        names = ("first", "second")[: self._trainers_source.choice([1, 1, 2])]
        self.trainers = [
            Trainer(name, self._trainers_source, self.receiver, self.intended, is_alone=len(names) == 1)
            for name in names
        ]
        self._seen_labels: set[str] = set()
        self._content_of: dict[str, Content] = {}  # by weights_id, as an engine served it first
        self._num_seen = 0  # of the reported states
        self._are_trainers_at_work = True
        self._has_more = seed >= FIRST_WITH_MORE
        self._more_source = random.Random(seed + 2 * 10**6)

    @property
    def seen(self) -> Counter[str]:
        """What has happened, for tests: troubles of trainers, and what came while a bracket was open."""
        return self.receiver.seen

    def heal(self) -> None:
        self._are_trainers_at_work = False
        super().heal()

    def _happen(self) -> None:
        num_asked, num_deaths = len(self.server.asked), self.num_deaths
        super()._happen()
        is_flush = self._has_more and self._more_source.random() < 0.004
        if is_flush:
            self.server.flush()
        if self._has_more and self._more_source.random() < 0.05:
            for asked in self.receiver.waiting():
                self.server.abandon(asked)
        if self.receiver.transfers.open is not None:
            for asked in self.server.asked[num_asked:]:
                self.seen[f"{type(asked.change).__name__} within"] += 1
            self.seen["flush within"] += is_flush
            self.seen["death of an engine within"] += self.num_deaths - num_deaths

    def _turn(self) -> None:
        now_s = self.server.clock.now()
        if self._are_trainers_at_work:
            for trainer in self.trainers:
                trainer.turn(now_s)
        if now_s >= self.receiver.transfers.next_look_s:  # the server's timer
            self.seen["overdue"] += 1
            self.receiver.transfers.tick(now_s)
        self.receiver.turn(now_s)
        super()._turn()
        self._check_transfers()

    def _check_transfers(self) -> None:
        now_s, contents = self.server.clock.now(), self.receiver.contents
        opened = self.receiver.transfers.open
        is_overdue = opened is not None and now_s > opened.deadline_s + 0.1
        demand(not is_overdue, "overdue_is_dropped", f"{opened} at {now_s:.2f} s")
        desired = self.server.fleet.desired
        in_place = [] if desired is None else [step.path for step in desired.weights if step.is_received]
        gone = set(in_place) - self.staging.folders.keys()
        demand(not gone, "staging_is_kept", f"{gone} is in place, and no engine could read it again")
        left = [path for path in self.staging.folders if self.receiver.owners[path].phase is Phase.ENDED]
        demand(not left, "staging_is_freed", left)
        for place in self.server.places:
            if place.engine is None:
                continue
            state, weights = place.engine.state, place.engine.runner.weights
            if state.weights in contents:
                found = contents[state.weights]
                demand(found in self.intended, "whole_or_nothing", f"engine {place.index} has {found}")
            assert isinstance(weights, ReceivedWeights)
            if place.index in self.server.fleet.candidates():
                first = self._content_of.setdefault(state.weights, weights.content)
                where = f"engine {place.index} has {weights.content} under the name of {first}"
                demand(first == weights.content, "same_tensors", where)
        for _, says in self.server.history[self._num_seen :]:  # as decided: engines then have what is reported
            if says.label in self.receiver.bound_labels - self._seen_labels:
                self._seen_labels.add(says.label)
                came_with = self.receiver.of_labels.get(says.label)
                where = f"{says.label} on {says.weights}, not on {came_with}"
                demand(came_with == says.weights, "label_with_weights", where)
        self._num_seen = len(self.server.history)
