"""The simulation's driver, with what tests of the engine need around it."""

from typing import Any
from weakref import WeakKeyDictionary

from headwater.cache.storage.tier import StorageSettings
from headwater.simulation import driver
from headwater.simulation.driver import CLIENT
from headwater.simulation.engine_shape import VOCAB_SIZE, EngineShape
from headwater.simulation.fakes.canary import expected_tokens, namespace_text
from headwater.simulation.fakes.shared_world import SharedWorld
from headwater.simulation.fakes.wire import MemoryWire
from headwater.storage.backend import StorageBackend

__all__ = ["CLIENT", "VOCAB_SIZE", "Driver", "MemoryWire", "expected"]
_worlds: WeakKeyDictionary[StorageBackend, SharedWorld] = WeakKeyDictionary()  # of engines that share a store


class Driver(driver.Driver):
    """`Driver(num_pages=40, is_async=True)`: an engine of this shape, all else as `EngineShape` has it."""

    def __init__(
        self,
        *,
        backend: StorageBackend | None = None,
        storage_settings: StorageSettings | None = None,
        **shape: Any,
    ) -> None:
        world = None if backend is None else _worlds.setdefault(backend, SharedWorld())
        super().__init__(EngineShape(**shape), world=world, backend=backend, storage_settings=storage_settings)


def expected(
    prompt: list[int],
    num_tokens: int,
    weights: list[str] | str = "w0",
    *,
    cache_salt: str = "",
    extra_key: str = "",
) -> list[int]:
    """The oracle's text; `weights` names those that computed each position."""
    return expected_tokens(
        prompt, num_tokens, VOCAB_SIZE, weights, namespace=namespace_text(cache_salt, extra_key)
    )
