"""The same workload on several fleets, to choose between them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headwater.planning.fleet import Fleet
from headwater.planning.fleet_result import FleetResult
from headwater.planning.planned_engine import EnginePlan
from headwater.planning.trace import PlannedRequest


@dataclass(frozen=True, slots=True)
class FleetSizes:
    """What differs between the fleets. Sizes are of each engine, that of the store is of all together."""

    num_engines: int
    device_gb: float | None  # None: what the device has
    host_gb: float
    storage_gb: float


@dataclass(frozen=True, slots=True)
class Compared:
    """One fleet and how it did. `label` says what sets it apart from the others."""

    sizes: FleetSizes
    plan: EnginePlan
    label: str
    result: FleetResult


def all_sizes(
    engines: Sequence[int],
    device_gb: Sequence[float | None],
    host_gb: Sequence[float],
    storage_gb: Sequence[float],
) -> list[FleetSizes]:
    """Every combination; a store without host memory is left out, since it cannot be used."""
    found = [FleetSizes(*sizes) for sizes in itertools.product(engines, device_gb, host_gb, storage_gb)]
    possible = [sizes for sizes in found if sizes.host_gb or not sizes.storage_gb]
    if not possible:
        raise ValueError("storage-gb needs host memory: pages go through it")
    return possible


def compare(
    fleets: Sequence[tuple[FleetSizes, EnginePlan]],
    trace: Sequence[PlannedRequest],
    *,
    on_end: Callable[[], None] | None = None,
) -> Iterator[Compared]:
    """Play `trace` on each fleet, one after the other."""
    labels = label_each([sizes for sizes, _ in fleets])
    for (sizes, plan), label in zip(fleets, labels, strict=True):
        result = Fleet(plan, num_engines=sizes.num_engines).play(trace, on_end=on_end)
        yield Compared(sizes, plan, label, result)


def label_each(sizes: Sequence[FleetSizes]) -> list[str]:
    """What differs within `sizes`, in words; with nothing that does, the number of engines."""
    words = [
        (
            f"{each.num_engines} engine{'s' if each.num_engines > 1 else ''}",
            "device full" if each.device_gb is None else f"device {each.device_gb:g} GB",
            f"host {each.host_gb:g} GB" if each.host_gb else "no host",
            f"store {each.storage_gb:g} GB" if each.storage_gb else "no store",
        )
        for each in sizes
    ]
    differs = [len(set(column)) > 1 for column in zip(*words, strict=True)]
    return [", ".join(itertools.compress(row, differs)) or row[0] for row in words]
