"""Deferred operations: started by a message, looked at every turn, answered exactly once."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from headwater.clock import Clock, Deadline
from headwater.control.at_once import AtOnce, PinChange
from headwater.control.flush import Flush
from headwater.control.memory import MemoryRelease, MemoryResume
from headwater.control.operation import Caller, Hold, Operation, PendingOperation, Permit
from headwater.control.pause import Pause
from headwater.control.ports import (
    BlockersPort,
    CachePort,
    FlushScope,
    IdentityPort,
    KvMemoryPort,
    PinningPort,
    RequestsPort,
    StepPort,
    StoragePort,
    WeightsPort,
)
from headwater.control.refusals import refuse_scope, refuse_tags, refuse_timeout
from headwater.control.released_memory import ReleasedMemory
from headwater.control.storage import StorageAttach
from headwater.control.weights import WeightUpdate
from headwater.messages.base import Call, unpack_ids
from headwater.messages.cache import AttachStorage, DetachStorage, GetStorage, PinPrefix, UnpinPrefix
from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    Done,
    Failed,
    FlushCache,
    OperationInfo,
    PauseGeneration,
)
from headwater.messages.two_phase import Commit, InStep, Prepare, Prepared
from headwater.messages.weights import (
    GetWeights,
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    UpdateWeights,
    Weights,
    WeightVersionSet,
)
from headwater.messages.wire import ToClient

_STEP_TIMEOUT_S = 600.0  # a pause answers when the step in flight is done; no step takes this long
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class EnginePorts:
    """The engine, as the control plane sees it."""

    cache: CachePort
    requests: RequestsPort
    step: StepPort
    blockers: BlockersPort
    weights: WeightsPort
    kv_memory: KvMemoryPort
    identity: IdentityPort
    storage: StoragePort
    pinning: PinningPort


class ControlPlane:
    """All pending operations, and what keeps admission closed.

    Any number may be pending; each has its own deadline, counted from its arrival. One idle moment answers
    all that wait for it.
    """

    def __init__(self, ports: EnginePorts, *, clock: Clock, max_timeout_s: float) -> None:
        self._ports = ports
        self._clock = clock
        self._max_timeout_s = max_timeout_s
        self._pending: list[PendingOperation] = []
        self._answers: list[tuple[bytes, ToClient]] = []
        self._ids = itertools.count(1)
        self._released = ReleasedMemory()
        self._has_answered = False  # in the last turn: what others wait for may be so now
        self.is_paused = False
        self.is_behind = False  # the others have made a change that came too late here

    # --- messages -----------------------------------------------------------------------------------

    def flush(self, message: FlushCache, client: bytes) -> None:
        cache = self._ports.cache
        failure = refuse_timeout(message, max_s=self._max_timeout_s) or refuse_scope(message, tiers=cache.tiers)
        if failure is not None:
            self._answers.append((client, failure))
            return
        scope = FlushScope(
            tiers=message.tiers or tuple(tier for tier in cache.tiers if tier != "storage"),
            cache_salt=message.cache_salt,
            extra_key=message.extra_key,
            prefix=None if message.prefix_ids is None else unpack_ids(message.prefix_ids),
        )
        self._start(Flush(message, scope, cache), message, client, timeout_s=message.timeout_s)

    def prepare(self, message: Prepare, client: bytes) -> None:
        """Check and bring what `message.change` needs; it is carried out when `commit` says so."""
        change, permit = message.change, Permit(is_given=False)
        match change:
            case ContinueGeneration():
                self._start_at_once(
                    "continue_generation", change, client, permit=permit, do=lambda: self._go_on(change)
                )
            case SetWeightVersion():
                self._start_at_once("set_weight_version", change, client, permit=permit, do=lambda: self._label(change))
            case DetachStorage():
                detach = self._ports.storage.detach
                self._start_at_once("detach_storage", change, client, permit=permit, do=lambda: detach(change.call_id))
            case PinPrefix() | UnpinPrefix():
                self._start(PinChange(change, self._ports.pinning, permit), change, client, permit=permit)
            case PauseGeneration():
                self.pause(change, client, permit=permit)
            case UpdateWeights():
                self.update_weights(change, client, permit=permit)
            case ReleaseMemory():
                self.release_memory(change, client, permit=permit)
            case ResumeMemory():
                self.resume_memory(change, client, permit=permit)
            case AttachStorage():
                self.attach_storage(change, client, permit=permit)
            case _:
                assert_never(change)

    def commit(self, message: Commit, client: bytes) -> None:
        """All engines could: carry out what was prepared, unless it has been given up meanwhile."""
        caller = Caller(client, message.prepared)
        for pending in self._pending:
            if pending.caller == caller and pending.permit.is_awaited and not pending.has_expired(self._clock):
                pending.commit()
                return
        self.is_behind = True
        self._ports.requests.refuse_new("the engine has missed a change that the server was told; it is being made up")
        text = "what was prepared has been given up: no word came to carry it out"
        self._answers.append((client, Failed(call_id=message.prepared, status=410, message=text)))

    def in_step(self, message: InStep, client: bytes) -> None:
        self.is_behind = False
        self._ports.requests.refuse_new(None)
        self._answers.append((client, Done(call_id=message.call_id)))

    def pause(self, message: PauseGeneration, client: bytes, *, permit: Permit | None = None) -> None:
        pause = Pause(
            message, requests=self._ports.requests, step=self._ports.step, begin=self._begin_pause, permit=permit
        )
        if permit is None:
            self._begin_pause()  # in this turn, whatever comes first among what is pending
        self._start(pause, message, client, timeout_s=_STEP_TIMEOUT_S, permit=permit)

    def resume(self, message: ContinueGeneration, client: bytes) -> None:
        self._answers.append((client, self._go_on(message)))

    def update_weights(self, message: UpdateWeights, client: bytes, *, permit: Permit | None = None) -> None:
        ports = self._ports
        operation = WeightUpdate(
            message,
            weights=ports.weights,
            identity=ports.identity,
            cache=ports.cache,
            requests=ports.requests,
            step=ports.step,
            released=self._released,
            permit=permit,
        )
        self._start_checked(operation, message, client, permit=permit)

    def release_memory(self, message: ReleaseMemory, client: bytes, *, permit: Permit | None = None) -> None:
        operation = MemoryRelease(
            message,
            released=self._released,
            cache=self._ports.cache,
            step=self._ports.step,
            kv_memory=self._ports.kv_memory,
            weights=self._ports.weights,
            permit=permit,
        )
        self._start_checked(operation, message, client, permit=permit)

    def resume_memory(self, message: ResumeMemory, client: bytes, *, permit: Permit | None = None) -> None:
        operation = MemoryResume(
            message,
            released=self._released,
            cache=self._ports.cache,
            kv_memory=self._ports.kv_memory,
            weights=self._ports.weights,
            identity=self._ports.identity,
            requests=self._ports.requests,
            permit=permit,
        )
        self._start_checked(operation, message, client, permit=permit)

    def attach_storage(self, message: AttachStorage, client: bytes, *, permit: Permit | None = None) -> None:
        why_not = self._ports.storage.why_not()
        if why_not is not None:
            failed = Failed(call_id=message.call_id, status=400, message=why_not, param="hicache_storage_backend")
            self._answers.append((client, failed))
            return
        self._start_checked(StorageAttach(message, self._ports.storage, permit), message, client, permit=permit)

    def detach_storage(self, message: DetachStorage, client: bytes) -> None:
        self._answers.append((client, self._ports.storage.detach(message.call_id)))

    def get_storage(self, message: GetStorage, client: bytes) -> None:
        self._answers.append((client, self._ports.storage.info(message.call_id)))

    def set_weight_version(self, message: SetWeightVersion, client: bytes) -> None:
        self._answers.append((client, self._label(message)))

    def get_weights(self, message: GetWeights, client: bytes) -> None:
        answer: ToClient
        try:
            if "weights" in self._released.tags:
                raise KeyError(message.name)
            dtype, shape, values = self._ports.weights.values(message.name, message.num_values)
            answer = Weights(call_id=message.call_id, name=message.name, dtype=dtype, shape=shape, values=values)
        except KeyError:
            text = f"the model has no parameter {message.name!r}, or its weights are released"
            answer = Failed(call_id=message.call_id, status=404, message=text, param="name")
        self._answers.append((client, answer))

    def cancel(self, message: CancelOperation, client: bytes) -> None:
        """Cancel by operation id, or (when its caller went away) by the call that started it."""
        started = Caller(client, message.started_by_call)
        for pending in self._pending:
            is_named = message.operation_id != "" and pending.operation_id == message.operation_id
            if is_named or pending.caller == started:
                if pending.is_decided:
                    text = "it is being carried out: every engine of the server could, and does"
                    self._answers.append((client, Failed(call_id=message.call_id, status=409, message=text)))
                    return
                self._pending.remove(pending)
                moment = pending.moment(self._clock, self._ports.blockers())
                answer = pending.operation.cancelled(moment, "cancelled")
                self._answers.append((pending.caller.client, answer))
                self._answers.append((client, Done(call_id=message.call_id)))
                return
        text = f"no operation {message.operation_id or message.started_by_call!r} is pending"
        self._answers.append((client, Failed(call_id=message.call_id, status=404, message=text)))

    # --- every turn ---------------------------------------------------------------------------------

    def advance(self) -> None:
        """Look at every pending operation, in order of arrival. Costs nothing when none is pending."""
        self._has_answered = False
        if not self._pending:
            return
        has_exclusive = False
        for pending in self._pending.copy():
            if pending not in self._pending:
                continue  # ended by one before it: a pause, by going on
            moment = pending.moment(self._clock, self._ports.blockers())
            pending.has_seen_deadline = moment.has_expired
            if pending.has_expired(self._clock):
                answer = pending.operation.cancelled(moment, "nobody waits for it any more")
            elif has_exclusive and pending.operation.is_exclusive:
                reason = "the deadline passed while another operation was carried out"
                answer = pending.operation.cancelled(moment, reason) if moment.has_expired else None
            else:
                answer = pending.operation.look(moment)
                self._report_prepared(pending)
            if answer is not None:
                self._pending.remove(pending)
                self._answers.append((pending.caller.client, answer))
                self._has_answered = True
            has_exclusive |= answer is None and pending.operation.is_exclusive

    def take_answers(self) -> list[tuple[bytes, ToClient]]:
        answers, self._answers = self._answers, []
        return answers

    @property
    def has_answers(self) -> bool:
        return bool(self._answers)

    @property
    def hold(self) -> Hold:
        """What may not run now: admission is closed while anyone holds it."""
        if self.is_paused or self._released.tags:
            return Hold.ALL
        return max([p.operation.hold for p in self._pending], default=Hold.NOTHING)

    @property
    def held_by(self) -> tuple[str, ...]:
        """Orders by which requests wait now, by name; empty when whatever arrives may run."""
        orders = ["pause"] if self.is_paused else []
        orders += [f"released_{tag}" for tag in self._released.as_tuple()]
        orders += [p.operation.kind for p in self._pending if p.operation.hold > Hold.NOTHING]
        return tuple(dict.fromkeys(orders))

    def next_look_s(self) -> float | None:
        """Seconds until an operation must be looked at again though nothing else happens; None if never."""
        if self._has_answered and self._pending:
            return 0.0  # a pause, for example, has just made the engine idle
        return min((self._wait_s(pending) for pending in self._pending), default=None)

    def _wait_s(self, pending: PendingOperation) -> float:
        remaining_s = pending.deadline.remaining_s(self._clock)
        if pending.expires_at_s is not None and (pending.permit.is_awaited or pending.has_seen_deadline):
            return max(0.0, pending.expires_at_s - self._clock.now())
        if not pending.operation.is_polling:
            return remaining_s
        return _POLL_S if pending.has_seen_deadline else min(remaining_s, _POLL_S)

    def in_flight(self) -> dict[str, int]:
        """Operations being carried out; one that waits is no blocker."""
        found: dict[str, int] = {}
        for pending in self._pending:
            for name, count in pending.operation.in_flight().items():
                found[name] = found.get(name, 0) + count
        return found

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def num_decided(self) -> int:
        return sum(pending.is_decided for pending in self._pending)

    @property
    def released_memory(self) -> tuple[str, ...]:
        return self._released.as_tuple()

    def operations(self) -> tuple[OperationInfo, ...]:
        blockers = self._ports.blockers() if self._pending else {}
        return tuple(
            OperationInfo(
                operation_id=p.operation_id,
                kind=p.operation.kind,
                phase=p.phase,
                waited_s=self._clock.now() - p.arrived_s,
                remaining_s=p.deadline.remaining_s(self._clock),
                blockers=blockers,
                call_id=p.caller.call_id,
            )
            for p in self._pending
        )

    # ------------------------------------------------------------------------------------------------

    def _begin_pause(self) -> None:
        self.is_paused = True

    def _go_on(self, message: ContinueGeneration) -> Done:
        for pending in [p for p in self._pending if isinstance(p.operation, Pause) and p.permit.is_given]:
            # It waits for a moment without a step, which may be long in coming now.
            self._pending.remove(pending)
            moment = pending.moment(self._clock, self._ports.blockers())
            self._answers.append((pending.caller.client, pending.operation.cancelled(moment, "continued")))
        self.is_paused = False  # last: a pause of this very turn has only begun now
        return Done(call_id=message.call_id)

    def _label(self, message: SetWeightVersion) -> WeightVersionSet:
        ends_all = message.abort_all_requests
        if ends_all is None:  # rollouts that a trainer holds are to go on under the new label
            ends_all = not (self.is_paused or self._released.tags)
        num_aborted = 0
        if ends_all:
            num_aborted = self._ports.requests.abort_all("Aborted: the weight version was changed")
        self._ports.identity.set_weight_version(message.weight_version)
        return WeightVersionSet(call_id=message.call_id, weight_version=message.weight_version, num_aborted=num_aborted)

    def _report_prepared(self, pending: PendingOperation) -> None:
        permit = pending.permit
        if permit.is_awaited and not permit.is_reported:
            permit.is_reported = True
            prepared = Prepared(call_id=pending.caller.call_id, weights_id=permit.weights_id, is_whole=permit.is_whole)
            self._answers.append((pending.caller.client, prepared))

    def _start_at_once(
        self, kind: str, message: Call, client: bytes, *, permit: Permit, do: Callable[[], ToClient]
    ) -> None:
        self._start(AtOnce(kind, message.call_id, do, permit), message, client, permit=permit)

    def _start(
        self,
        operation: Operation,
        message: Call,
        client: bytes,
        *,
        timeout_s: float = _STEP_TIMEOUT_S,
        permit: Permit | None = None,
    ) -> None:
        self._pending.append(
            PendingOperation(
                operation_id=f"op-{next(self._ids)}",
                operation=operation,
                caller=Caller(client, message.call_id),
                arrived_s=self._clock.now(),
                deadline=Deadline.after(self._clock, timeout_s),
                expires_at_s=message.expires_at_s,
                permit=permit or Permit(),
            )
        )

    def _start_checked(
        self,
        operation: Operation,
        message: UpdateWeights | ReleaseMemory | ResumeMemory | AttachStorage,
        client: bytes,
        *,
        permit: Permit | None,
    ) -> None:
        failure = refuse_timeout(message, max_s=self._max_timeout_s)
        if failure is None and isinstance(message, ReleaseMemory | ResumeMemory):
            failure = refuse_tags(message)
        if failure is not None:
            self._answers.append((client, failure))
            return
        self._start(operation, message, client, timeout_s=message.timeout_s, permit=permit)
