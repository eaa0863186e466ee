"""The host tier as the reader and the writer of a store use it."""

from dataclasses import dataclass

from headwater.cache.host_tier import HostPages
from headwater.cache.radix_tree import RadixTree
from headwater.cache.storage.names import StorageNames
from headwater.cache.tier_pages import TierPages
from headwater.cache.transfer import TransferCounters
from headwater.clock import Clock


@dataclass(frozen=True, slots=True)
class HostSide:
    """The common parts of the reader and the writer of a store: tree, host pages and memory, names, counters, clock."""

    tree: RadixTree
    tier: TierPages
    memory: HostPages
    names: StorageNames
    counters: TransferCounters
    clock: Clock
