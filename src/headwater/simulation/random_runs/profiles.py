"""The profiles of random runs: the frequency of each event, and the severity of faults."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Profile:
    """Relative frequencies of events, and the chances of an engine's features."""

    name: str
    requests: int = 50
    follow_ups: int = 10
    bursts: int = 1
    aborts: int = 5
    flushes: int = 8
    pauses: int = 2
    updates: int = 2
    releases: int = 1
    relabels: int = 1
    cancels: int = 2
    pins: int = 2
    pin_s: tuple[float, ...] = (0.05, 1.0, 30.0)  # one of these
    has_pins_on_host: bool = False
    attaches: int = 1
    questions: int = 2
    quiet: int = 2  # a while without messages
    inspections: int = 0
    flushes_everywhere: int = 0
    warmings: int = 0
    disconnects: int = 0
    nonsense: int = 0
    crashes: int = 0  # of engines, which restart with an empty cache
    fault_level: float = 1.0  # 0: none
    has_rare_faults: bool = False  # hanging copies, pages truncated or lost by a store
    has_step_faults: bool = False
    has_pooling: bool = False  # requests for embeddings
    has_limits: bool = False  # of the queue's tokens, of keys, and timeouts
    has_events: float = 0.0  # chance that a mirror follows the cache's events
    page_sizes: tuple[int, ...] = (4,)  # in tokens; one of these for all engines of a run
    has_host: float = 0.7
    has_store: float = 0.5  # share of the engines with a host tier
    has_two_engines: float = 0.3  # share of the runs with a store
    num_device_pages: tuple[int, ...] = (24, 40, 80)  # pages of 4 tokens; one of these, as for the next fields
    num_host_pages: tuple[int, ...] = (20, 60, 150)
    store_bytes: tuple[int, ...] = (3000, 20_000, 1 << 20)
    store_kind: Literal["memory", "file"] = "memory"
    grammars: float = 0.0  # share of the requests with a grammar
    has_split_flushes: bool = False  # of the store and one other tier
    num_stems: tuple[int, ...] = (3, 8)  # prefixes that requests share
    num_ranks: tuple[int, ...] = (1,)  # of each engine; one of these
    adapters: int = 0  # changes of LoRA adapters; most requests then name one
    adapter_scopes: float = 0.0  # share of the flushes and pins that name one
    repeats: float = 0.0  # share of the prompts that were asked shortly before
    has_drafts: bool = False  # speculation, with drafts that are right by chance or come from the tree


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("mixed"),
        Profile("calm", fault_level=0.0),
        Profile("flush", flushes=40, cancels=6, pauses=1, updates=1),
        Profile("training", pauses=10, updates=10, releases=5, flushes=15, relabels=3),
        Profile("tiers", has_host=1.0, has_store=0.8, fault_level=2.0, flushes=12, attaches=3, pins=4),
        Profile(
            "store",
            has_host=1.0,
            has_store=1.0,
            flushes=10,
            attaches=3,
            updates=0,
            pins=1,
            num_device_pages=(24, 30),
            num_host_pages=(20, 30),
            store_bytes=(20_000, 1 << 20),
            num_stems=(6, 12),
        ),
        Profile(
            "rough",
            aborts=8,
            flushes=12,
            updates=3,
            attaches=2,
            inspections=2,
            flushes_everywhere=3,
            warmings=4,
            disconnects=3,
            nonsense=4,
            crashes=1,
            fault_level=1.5,
            has_rare_faults=True,
            has_events=0.5,
            page_sizes=(1, 2, 4, 4, 8),
            has_host=0.8,
            has_store=0.7,
        ),
        Profile(
            "files",
            updates=1,
            flushes=10,
            attaches=2,
            crashes=1,
            fault_level=1.5,
            has_rare_faults=True,
            has_host=1.0,
            has_store=1.0,
            has_split_flushes=True,
            num_device_pages=(24, 30),
            num_host_pages=(20, 60),
            store_bytes=(1 << 26,),
            store_kind="file",
            num_stems=(6, 12),
        ),
        Profile(
            "adapters",
            adapters=12,
            flushes=6,
            pauses=3,
            updates=2,
            releases=2,
            attaches=2,
            warmings=2,
            has_store=0.7,
            num_stems=(2, 4),
        ),
        Profile(
            "adapter_scopes",
            adapters=6,
            adapter_scopes=0.6,
            flushes=25,
            pins=10,
            warmings=10,
            updates=1,
            attaches=1,
            has_store=0.3,
            num_stems=(2, 4),
        ),
        Profile(
            "rank_adapters",
            adapters=12,
            flushes=6,
            pauses=3,
            updates=2,
            releases=2,
            has_step_faults=True,
            has_host=0.7,
            has_store=0.0,
            num_device_pages=(24, 30),
            num_host_pages=(20, 60),
            num_stems=(2, 4),
            num_ranks=(2, 3),
        ),
        Profile("limits", has_limits=True, has_pooling=True, bursts=6, pauses=4, releases=0, num_device_pages=(24, 40)),
        Profile(
            "pins",
            pins=12,
            pin_s=(1.0, 30.0, 300.0, 3000.0),
            has_pins_on_host=True,
            warmings=12,
            questions=6,
            inspections=3,
            flushes=1,
            updates=0,
            releases=0,
            bursts=2,
            num_device_pages=(24, 30),
            num_host_pages=(20, 60),
        ),
        Profile(
            "ranks",
            flushes=15,
            updates=4,
            releases=3,
            has_step_faults=True,
            has_host=1.0,
            has_store=0.0,  # ranks of a simulation have host pages of their own, which no store fills
            num_device_pages=(24, 30),
            num_host_pages=(20, 60),
            num_ranks=(2, 3),
        ),
        Profile("failing", has_step_faults=True, bursts=4, follow_ups=20, has_host=0.4),
        Profile(
            "crashes",
            updates=1,
            flushes=10,
            flushes_everywhere=4,
            disconnects=1,
            crashes=6,
            has_rare_faults=True,
            has_events=0.2,
            has_host=1.0,
            has_store=1.0,
            has_two_engines=0.6,
            num_device_pages=(24, 30),
            num_host_pages=(20, 60),
            num_stems=(6, 12),
        ),
        Profile(
            "speculation",
            has_drafts=True,
            repeats=0.5,
            grammars=0.1,
            bursts=3,
            follow_ups=20,
            flushes=6,
            pauses=6,
            updates=4,
            releases=2,
            has_step_faults=True,
            has_host=0.6,
            has_store=0.0,  # as with ranks below
            num_device_pages=(24, 80, 200),
            page_sizes=(2, 4, 8),
            num_stems=(2, 4),
            num_ranks=(1, 1, 2),
        ),
        Profile(
            "grammars",
            grammars=0.7,
            bursts=4,
            follow_ups=20,
            flushes=12,
            pauses=4,
            has_step_faults=True,
            has_host=0.4,
        ),
    )
}


def find_profile(name: str) -> Profile:
    """Raises ValueError for an unknown name."""
    if name not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, found {name!r}")
    return PROFILES[name]
