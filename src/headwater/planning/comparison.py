"""Runs the same workload on several fleets, for a choice between them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headwater.planning.fleet import PlannedFleet
from headwater.planning.fleet_result import FleetResult
from headwater.planning.planned_engine import EnginePlan
from headwater.planning.trace import PlannedRequest


@dataclass(frozen=True, slots=True)
class FleetSizes:
    """The sizes in which fleets differ. They are per engine, except that of the store, which all engines share."""

    num_engines: int
    device_gb: float | None  # None: the device's own size
    host_gb: float
    storage_gb: float
    tp_size: int = 1  # devices of each engine


@dataclass(frozen=True, slots=True)
class Compared:
    """One fleet and its result. `label` names its differences from the other fleets."""

    sizes: FleetSizes
    plan: EnginePlan
    label: str
    result: FleetResult


def all_sizes(
    engines: Sequence[int],
    device_gb: Sequence[float | None],
    host_gb: Sequence[float],
    storage_gb: Sequence[float],
    tp_size: Sequence[int] = (1,),
) -> list[FleetSizes]:
    """Every combination, except a store without host memory, which the engine cannot use."""
    found = [FleetSizes(*sizes) for sizes in itertools.product(engines, device_gb, host_gb, storage_gb, tp_size)]
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
    """Run `trace` on each fleet, one after the other."""
    labels = label_each([sizes for sizes, _ in fleets])
    for (sizes, plan), label in zip(fleets, labels, strict=True):
        result = PlannedFleet(plan, num_engines=sizes.num_engines).play(trace, on_end=on_end)
        yield Compared(sizes, plan, label, result)


def label_each(sizes: Sequence[FleetSizes]) -> list[str]:
    """A label for each fleet: the sizes in which it differs, or the number of engines if nothing differs."""
    words = [
        (
            f"{each.num_engines} engine{'s' if each.num_engines > 1 else ''}",
            f"TP {each.tp_size}",
            "device full" if each.device_gb is None else f"device {each.device_gb:g} GB",
            f"host {each.host_gb:g} GB" if each.host_gb else "no host",
            f"store {each.storage_gb:g} GB" if each.storage_gb else "no store",
        )
        for each in sizes
    ]
    differs = [len(set(column)) > 1 for column in zip(*words, strict=True)]
    return [", ".join(itertools.compress(row, differs)) or row[0] for row in words]
