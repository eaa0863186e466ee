"""A store that fails by script: wraps another one, for tests and demonstrations of what faults cost.

Which keys are struck follows from a hash of the key, so a failure repeats exactly, whatever the threads do.
"""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from headwater.storage.backend import ReadStatus, StorageBackend, StorageUsage, WriteStatus
from headwater.storage.errors import StorageTimeout, StorageUnavailable
from headwater.storage.page_key import PageKey


class Fault(StrEnum):
    FAIL = "fail"  # raise StorageUnavailable
    TIMEOUT = "timeout"  # raise StorageTimeout
    HANG = "hang"  # block until `release`, then raise StorageTimeout
    DELAY = "delay"  # sleep for `delay_s`, then go on
    FULL = "full"  # `put` finds no room for the struck pages
    CORRUPT = "corrupt"  # a bit of each struck page flips before `get` reads it


@dataclass(frozen=True, slots=True)
class FaultRule:
    """Strikes a share of the keys in some calls of some operations.

    Calls are counted per operation, from 0. A whole call is struck by its first key, or, without keys, by its
    number; FULL and CORRUPT strike single pages.
    """

    fault: Fault
    operations: frozenset[str] | None = None  # names of StorageBackend's methods; None: all
    share: float = 1.0
    first_call: int = 0
    last_call: int | None = None  # None: for ever
    delay_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, found {self.share}")

    def is_in_force(self, operation: str, call: int) -> bool:
        return (
            (self.operations is None or operation in self.operations)
            and self.first_call <= call
            and (self.last_call is None or call <= self.last_call)
        )

    def strikes(self, name: bytes) -> bool:
        return self.hash_of(name) < self.share * 2**32

    def hash_of(self, name: bytes) -> int:
        salt = self.seed.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(name, digest_size=4, salt=salt).digest(), "little")


class DamageableBackend(StorageBackend, Protocol):
    def flip_bit(self, key: PageKey, bit: int) -> None:
        """Flip one bit of a stored page; KeyError if it is not there."""
        ...


class FaultyBackend:
    """Passes calls on to `inner`, unless a rule strikes. `rules` may be replaced at any time."""

    def __init__(
        self,
        inner: DamageableBackend,
        rules: Sequence[FaultRule] = (),
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.inner = inner
        self.rules = tuple(rules)
        self.num_struck: Counter[Fault] = Counter()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._num_calls: Counter[str] = Counter()
        self._released = threading.Event()

    @property
    def kind(self) -> str:
        return self.inner.kind

    def release(self) -> None:
        """Let all calls that hang, and will hang, end with StorageTimeout."""
        self._released.set()

    def generations(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        self._strike("generations")
        return self.inner.generations(scope_ids)

    def raise_generation(self, scope_id: bytes) -> int:
        self._strike("raise_generation")
        return self.inner.raise_generation(scope_id)

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        self._strike("exists", keys)
        return self.inner.exists(keys)

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        for rule in self._strike("get", keys):
            for key in self._struck_pages(rule, keys, fault=Fault.CORRUPT):
                self._damage(key, bit=rule.hash_of(key.page))
        return self.inner.get(keys, into)

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        refused: set[PageKey] = set()
        for rule in self._strike("put", keys):
            refused.update(self._struck_pages(rule, keys, fault=Fault.FULL))
        passed = [(key, page) for key, page in zip(keys, pages, strict=True) if key not in refused]
        statuses = iter(self.inner.put([key for key, _ in passed], [page for _, page in passed]))
        return [WriteStatus.FULL if key in refused else next(statuses) for key in keys]

    def delete(self, keys: Sequence[PageKey]) -> int:
        self._strike("delete", keys)
        return self.inner.delete(keys)

    def usage(self) -> StorageUsage:
        self._strike("usage")
        return self.inner.usage()

    def reap(self, *, max_pages: int, abandoned: Collection[bytes] = ()) -> int:
        self._strike("reap")
        return self.inner.reap(max_pages=max_pages, abandoned=abandoned)

    def counters(self) -> dict[str, int]:
        return self.inner.counters()

    def close(self) -> None:
        self.release()
        self.inner.close()

    def _strike(self, operation: str, keys: Sequence[PageKey] = ()) -> list[FaultRule]:
        """Carry out the faults of whole calls; the rules in force, for those of single pages."""
        with self._lock:
            call = self._num_calls[operation]
            self._num_calls[operation] += 1
        name = keys[0].page if keys else f"{operation} {call}".encode()
        rules = [rule for rule in self.rules if rule.is_in_force(operation, call)]
        for rule in rules:
            if rule.fault not in (Fault.FULL, Fault.CORRUPT) and rule.strikes(name):
                self._note(rule.fault)
                self._carry_out(rule, operation)
        return rules

    def _carry_out(self, rule: FaultRule, operation: str) -> None:
        match rule.fault:
            case Fault.FAIL:
                raise StorageUnavailable(f"scripted failure of {operation}")
            case Fault.TIMEOUT:
                raise StorageTimeout(f"scripted timeout of {operation}")
            case Fault.HANG:
                self._released.wait()
                raise StorageTimeout(f"scripted hang of {operation}")
            case Fault.DELAY:
                self._sleep(rule.delay_s)

    def _struck_pages(self, rule: FaultRule, keys: Sequence[PageKey], *, fault: Fault) -> list[PageKey]:
        return [key for key in keys if rule.strikes(key.page)] if rule.fault is fault else []

    def _damage(self, key: PageKey, *, bit: int) -> None:
        try:
            self.inner.flip_bit(key, bit)
        except KeyError:
            return  # not stored: nothing to damage
        self._note(Fault.CORRUPT)

    def _note(self, fault: Fault) -> None:
        with self._lock:
            self.num_struck[fault] += 1
