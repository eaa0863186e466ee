"""Trainers of a simulated server: brackets of buckets that are slow, torn, repeated, reordered, or never ended."""

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from headwater.client.fleet import Fleet
from headwater.devices.safetensors_header import StoredTensor
from headwater.messages.weights import Parameters, SetWeightVersion, UpdateWeights
from headwater.simulation.fakes.memory import FakeStagedWeights, FakeWeights
from headwater.transports.bracket import Phase, Transfer, TransferRefused, Transfers

NAMES = ("a", "b", "c", "d")
MODEL = Parameters(call_id="", shapes=dict.fromkeys(NAMES, (1,)))
_RIGHT, _WRONG = StoredTensor("F32", (1,), 0, 4), StoredTensor("F32", (2,), 0, 8)
Content = dict[str, str]  # which trainer's step each tensor is of
Ask = Callable[..., Any]


class Staging:
    """The staging area: content by path."""

    def __init__(self) -> None:
        self.folders: dict[str, Content] = {}


class StagedTensors(FakeStagedWeights):
    """Received tensors that an engine has read."""

    def __init__(self, weights_id: str, content: Content | None, *, path: str, num_polls: int, base: Content) -> None:
        error = None if content is not None else f"{path} is gone"
        super().__init__(weights_id, num_polls=num_polls, error=error)
        self.content = {**base, **(content or {})}
        self.is_whole = set(content or ()) == set(NAMES)


class ReceivedWeights(FakeWeights):
    """Weights as tensors, some of which a trainer sent."""

    def __init__(self, staging: Staging, current: str) -> None:
        super().__init__(current)
        self._staging = staging
        self.content: Content = dict.fromkeys(NAMES, current)

    def stage_received(self, path: str, weights_id: str, *, in_place: bool = False) -> StagedTensors:
        content = self._staging.folders.get(path)
        return StagedTensors(weights_id, content, path=path, num_polls=self.num_polls, base=self.content)

    def swap(self, staged: FakeStagedWeights) -> None:
        if isinstance(staged, StagedTensors):
            self.content = staged.content
        elif staged.weights_id != self.current:  # a whole checkpoint, under its path
            self.content = dict.fromkeys(NAMES, staged.weights_id)
        super().swap(staged)


class SimulatedReceiver:
    """What the API process does around `Transfers`, without files: `http_api/control/weights/receiver.py`."""

    def __init__(self, fleet: Fleet, staging: Staging, ask: Ask, new_name: Callable[[str], str]) -> None:
        self._fleet, self._staging, self._ask, self._new_name = fleet, staging, ask, new_name
        self.transfers = Transfers(new_id=lambda: new_name("t"), drop=self._drop)
        self.contents: dict[str, Content] = {}  # of everything that was put in place, by weights_id
        self.of_labels: dict[str, str] = {}  # the weights_id that a label comes with
        self.bound_labels: set[str] = set()  # given while a bracket was open
        self.owners: dict[str, Transfer] = {}  # by path
        self._applying: dict[str, Any] = {}  # by path: the change, while it has a caller
        self.seen: Counter[str] = Counter()  # what has happened, for tests

    def arrive(self, transfer: Transfer, content: Content, *, is_misfit: bool) -> None:
        """A whole bucket. TransferRefused if it does not fit."""
        stored = _WRONG if is_misfit else _RIGHT
        try:
            self.transfers.bucket_ends(transfer, dict.fromkeys(content, stored), MODEL)
        except TransferRefused:
            if not transfer.is_bracket:
                self.transfers.give_up(transfer)
            raise
        if transfer.folder is None:
            transfer.folder = self._new_name("staged")
            self.owners[transfer.folder] = transfer
        self._staging.folders.setdefault(transfer.folder, {}).update(content)
        if not transfer.is_bracket:
            self.transfers.seal(transfer)
            self.put_in_place(transfer)

    def put_in_place(self, transfer: Transfer) -> Any:
        """Ask the engines for a complete transfer."""
        weights_id = self._new_name("sent")
        self.contents[weights_id] = dict(self._staging.folders[transfer.folder])
        change = UpdateWeights(
            call_id=self._new_name("call"),
            path=transfer.folder,
            weight_version=transfer.weight_version,
            weights_id=weights_id,
            names=tuple(transfer.tensors),
            timeout_s=20.0,
        )
        if transfer.weight_version is not None:
            self.of_labels[transfer.weight_version] = weights_id
        asked = self._applying[transfer.folder] = self._ask(change, timeout_s=20.0)
        return asked

    def waiting(self) -> list[Any]:
        """Changes whose callers wait for their answers."""
        return [asked for asked in self._applying.values() if asked.call.outcome is None and not asked.is_abandoned]

    def label(self, weight_version: str, *, now_s: float) -> None:
        if self.transfers.open is not None:
            self.bound_labels.add(weight_version)
        if not self.transfers.take_label(weight_version, aborts_all=False, now_s=now_s):
            self._ask(SetWeightVersion(call_id=self._new_name("call"), weight_version=weight_version), timeout_s=10.0)

    def turn(self, now_s: float) -> None:
        for path, asked in list(self._applying.items()):
            if asked.call.outcome is not None or asked.is_abandoned:
                self.seen["caller left"] += asked.is_abandoned
                del self._applying[path]
        for each in set(self._staging.folders) - self.needed:
            if self.owners[each].phase is Phase.SEALED:
                del self._staging.folders[each]

    @property
    def needed(self) -> set[str]:
        """Folders that are in use, being put in place, or receive."""
        opened = self.transfers.open
        receiving = {opened.folder} if opened is not None and opened.folder is not None else set()
        return set(self._fleet.staged_in_use) | set(self._applying) | receiving

    def _drop(self, transfer: Transfer) -> None:
        if transfer.folder is not None:
            self._staging.folders.pop(transfer.folder, None)


@dataclass(slots=True)
class _Arriving:
    """A bucket on its way."""

    transfer: Transfer
    content: Content
    ends_at_s: float
    is_torn: bool
    is_misfit: bool


@dataclass(slots=True, eq=False)
class Trainer:
    """One process that sends its steps. It may be sloppy: a refused call does not stop it."""

    name: str
    source: random.Random
    receiver: SimulatedReceiver
    intended: list[Content]  # shared: what some trainer has asked to become visible
    step: str = ""
    queue: list[Content] = field(default_factory=list)  # buckets to send
    arriving: list[_Arriving] = field(default_factory=list)
    has_begun: bool = False
    is_alone: bool = True  # else it names its brackets
    transfer_id: str | None = None
    is_dead: bool = False
    num_ended: int = 0
    num_refused: int = 0

    def turn(self, now_s: float) -> None:
        self._arrive(now_s)
        if self.is_dead:
            if self.source.random() < 0.02:  # a new process
                self.is_dead, self.has_begun, self.queue = False, False, []
            return
        if self.source.random() < 0.15:
            try:
                self._act(now_s)
            except TransferRefused:
                self.num_refused += 1
                if self.source.random() < 0.5:
                    self._start_over(now_s)

    def _act(self, now_s: float) -> None:
        if not self.has_begun:
            self._begin(now_s)
        elif self.queue:
            self._send(self.queue.pop(0), now_s)
        elif not self.arriving or self.source.random() < 0.2:
            self._end(now_s)

    def _begin(self, now_s: float) -> None:
        self.step = f"{self.name}.{self.num_ended + self.num_refused}.{self.source.randrange(10**6)}"
        if self.is_alone and self.source.random() < 0.2:  # without a bracket: some tensors alone
            names = self.source.sample(NAMES, self.source.randint(1, 4))
            content: Content = dict.fromkeys(names, self.step)
            self.intended.append(content)
            self._send(content, now_s)
            return
        deadline_s = now_s + self.source.choice([0.5, 3.0, 20.0])
        begun = self.receiver.transfers.begin(deadline_s=deadline_s, now_s=now_s)
        self.transfer_id = None if self.is_alone else begun.transfer_id
        self.has_begun = True
        parts = self.source.choice([[NAMES], [NAMES[:2], NAMES[2:]], [(name,) for name in NAMES]])
        in_order = [dict.fromkeys(part, self.step) for part in parts]
        self.queue = list(in_order)
        self.source.shuffle(self.queue)
        self.receiver.seen["reordered"] += self.queue != in_order
        if self.source.random() < 0.2:
            self.queue.append(self.source.choice(self.queue))  # sent once more
            self.receiver.seen["repeated"] += 1

    def _send(self, content: Content, now_s: float) -> None:
        chance = self.source.random()
        name = self.transfer_id if self.has_begun else None
        transfer = self.receiver.transfers.bucket_begins(name, deadline_s=now_s + 60, now_s=now_s)
        takes_s = self.source.choice([0.0, 0.1, 1.0])
        self.receiver.seen["slow"] += takes_s == 1.0
        self.arriving.append(
            _Arriving(transfer, content, now_s + takes_s, is_torn=chance < 0.04, is_misfit=0.04 < chance < 0.06)
        )
        if self.source.random() < 0.02:
            self.is_dead = True
            self.receiver.seen["died after a bucket"] += 1

    def _arrive(self, now_s: float) -> None:
        for bucket in [each for each in self.arriving if each.ends_at_s <= now_s or self.is_dead]:
            self.arriving.remove(bucket)
            if bucket.is_torn or self.is_dead:
                self.receiver.seen["torn"] += bucket.is_torn
                self.receiver.transfers.bucket_fails(bucket.transfer, "torn")
                if not bucket.transfer.is_bracket:
                    self.receiver.transfers.give_up(bucket.transfer)
                continue
            self.receiver.seen["misfit"] += bucket.is_misfit
            try:
                self.receiver.arrive(bucket.transfer, bucket.content, is_misfit=bucket.is_misfit)
            except TransferRefused:
                self.num_refused += 1

    def _end(self, now_s: float) -> None:
        label = f"label {self.step}"
        if self.source.random() < 0.5:
            self.receiver.label(label, now_s=now_s)
        if self.source.random() < 0.05:
            self.is_dead = True
            self.receiver.seen["died before the end"] += 1
            return
        self.has_begun = False
        self.intended.append(dict.fromkeys(NAMES, self.step))
        transfer = self.receiver.transfers.end(self.transfer_id, now_s=now_s)
        self.receiver.put_in_place(transfer)
        self.num_ended += 1

    def _start_over(self, now_s: float) -> None:
        self.has_begun, self.queue = False, []
        if self.source.random() < 0.3:
            with contextlib.suppress(TransferRefused):  # another trainer's is open by now
                self.receiver.transfers.abort(self.transfer_id, now_s=now_s)
