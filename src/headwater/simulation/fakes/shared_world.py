"""The state that simulated engines share: the count of turns, and the owners of all KV."""

from dataclasses import dataclass, field

from headwater.simulation.checks.violation import Violation
from headwater.simulation.fakes.canary import namespace_text


@dataclass(frozen=True, slots=True)
class KvSequence:
    """One stay of a request in a slot. The records of pages computed in it name it as their owner.

    `tokens` only grows, by the computed tokens.
    """

    rid: str
    cache_salt: str
    extra_key: str
    no_store: bool
    tokens: list[int]
    weights: str = ""  # current at its start
    adapter: str = ""  # content of its LoRA adapter

    @property
    def namespace(self) -> str:
        return namespace_text(self.cache_salt, self.extra_key, self.adapter)


@dataclass(slots=True)
class StoreRetirement:
    """A flush of a store. Pages in its scope that were born before `turn` may no longer be read from the store.

    This holds immediately for the engine that flushed, and from the acknowledgement on for other engines.
    """

    cache_salt: str | None
    extra_key: str | None
    turn: int
    flushed_by: object
    acknowledged_turn: int | None = None

    def covers(self, *, cache_salt: str, extra_key: str) -> bool:
        return self.cache_salt in (None, cache_salt) and self.extra_key in (None, extra_key)

    def in_force_for(self, engine: object) -> int | None:
        """The turn from which on it holds for `engine`; None if it does not hold yet."""
        return self.turn if engine is self.flushed_by else self.acknowledged_turn


@dataclass(slots=True)
class SharedWorld:
    """The turns and owners of one engine, or of several that share a store."""

    turn: int = 1  # of all engines together; also the time of birth of the KV computed in it
    sequences: list[KvSequence] = field(default_factory=lambda: [KvSequence("", "", "", False, [])])
    store_retirements: list[StoreRetirement] = field(default_factory=list)

    def sequence(self, number: int) -> KvSequence:
        """The owner of a record. Raises `Violation` for an unknown one, since the record's bytes are then damaged."""
        if number >= len(self.sequences):
            raise Violation("kv_is_its_own", f"a page holds KV of sequence {number}, which never existed")
        return self.sequences[number]

    def add_sequence(self, sequence: KvSequence) -> int:
        self.sequences.append(sequence)
        return len(self.sequences) - 1
