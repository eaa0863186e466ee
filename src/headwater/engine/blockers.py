"""The only definition of idle: the sum of what all components have in flight is empty."""

from typing import Protocol


class HoldsWork(Protocol):
    """A component that can hold work across loop turns."""

    def in_flight(self) -> dict[str, int]:
        """Its work in flight: name to count, no zeros. The dict is the caller's to change."""
        ...


class Blockers:
    """Asks every registered component. Components register once, when the engine is put together."""

    def __init__(self) -> None:
        self._components: dict[str, HoldsWork] = {}

    def register(self, name: str, component: HoldsWork) -> None:
        assert name not in self._components, f"{name} is registered twice"
        self._components[name] = component

    @property
    def components(self) -> dict[str, HoldsWork]:
        return dict(self._components)

    def __call__(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for component in self._components.values():
            work = component.in_flight()
            if not work:
                continue
            if not found:  # as mostly: one component at a time has work
                found = work
                continue
            for blocker, count in work.items():
                found[blocker] = found.get(blocker, 0) + count
        return found
