"""What several simulated engines share: the order of their turns, and whose pages there are."""

from dataclasses import dataclass, field

from headwater.simulation.checks.violation import Violation
from headwater.simulation.fakes.canary import namespace_text


@dataclass(frozen=True, slots=True)
class KvSequence:
    """One run of a request: pages computed in it name it in their records.

    `tokens` grows with what is computed and is never changed otherwise.
    """

    rid: str
    cache_salt: str
    extra_key: str
    no_store: bool
    tokens: list[int]
    weights: str = ""  # in place when it began

    @property
    def namespace(self) -> str:
        return namespace_text(self.cache_salt, self.extra_key)


@dataclass(slots=True)
class StoreRetirement:
    """A flush of a store: nothing in its scope born before `turn` may come out of the store any more.

    For the engine that flushed that holds at once, for others on the store once the flush was acknowledged.
    """

    cache_salt: str | None
    extra_key: str | None
    turn: int
    flushed_by: object
    acknowledged_turn: int | None = None

    def covers(self, *, cache_salt: str, extra_key: str) -> bool:
        return self.cache_salt in (None, cache_salt) and self.extra_key in (None, extra_key)

    def in_force_for(self, engine: object) -> int | None:
        """From which turn on; None if it is not, yet."""
        return self.turn if engine is self.flushed_by else self.acknowledged_turn


@dataclass(slots=True)
class World:
    """Engines that share a store share one of these."""

    turn: int = 1  # of all engines together; also the time of birth of what they compute
    sequences: list[KvSequence] = field(default_factory=lambda: [KvSequence("", "", "", False, [])])
    store_retirements: list[StoreRetirement] = field(default_factory=list)

    def sequence(self, number: int) -> KvSequence:
        """Whose a record is. Raises `Violation`: it names nobody, so its bytes are no longer what was written."""
        if number >= len(self.sequences):
            raise Violation("kv_is_its_own", f"a page holds KV of sequence {number}, which never was")
        return self.sequences[number]

    def add_sequence(self, sequence: KvSequence) -> int:
        self.sequences.append(sequence)
        return len(self.sequences) - 1
