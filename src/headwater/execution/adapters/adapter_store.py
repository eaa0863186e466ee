"""The adapters of a runner, for the control plane (control.ports.AdaptersPort)."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from headwater.devices.adapters import Adapter, AdapterMemory
from headwater.models.adapters.adapter import find_adapter, read_adapter
from headwater.models.config import ModelConfig

_log = logging.getLogger(__name__)


class StagedAdapter:
    """An adapter that a thread reads, checks and converts for the device.

    The thread may hang for ever in a read (of a network mount), so nothing joins it or waits for it.
    """

    def __init__(self, path: str, read: Callable[[], tuple[Adapter, Any]]) -> None:
        self.path = path
        self._read = read
        self._found: tuple[Adapter, Any] | None = None
        self._error: str | None = None
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._run, name="stage-adapter", daemon=True)
        self._thread.start()

    def is_ready(self) -> bool:
        return not self._thread.is_alive()

    def error(self) -> str | None:
        return self._error

    def abandon(self) -> None:
        """It will not be used: drop what was read."""
        self._is_abandoned = True
        self._found = None

    @property
    def adapter_id(self) -> str:
        return self._adapter.adapter_id

    @property
    def rank(self) -> int:
        return self._adapter.rank

    @property
    def num_bytes(self) -> int:
        return self._adapter.num_bytes

    @property
    def prepared(self) -> Any:
        """What the memory's `prepare` made of it."""
        assert self._found is not None, "not read, or in vain"
        return self._found[1]

    @property
    def _adapter(self) -> Adapter:
        assert self._found is not None, "not read, or in vain"
        return self._found[0]

    def _run(self) -> None:
        try:
            found = self._read()
            if not self._is_abandoned:
                self._found = found
        except Exception as error:  # noqa: BLE001  whatever a torn file makes its reader raise, serving goes on
            _log.warning("an adapter was refused: %s", error)
            self._error = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


class AdapterStore:
    """Reads adapters for a model, and puts them in the slots of a memory."""

    def __init__(
        self,
        memory: AdapterMemory,
        config: ModelConfig,
        *,
        form: str,
        hub_refusal: str | None = "hub ids are not fetched",
    ) -> None:
        """`form`: the format in which adapters are served. `hub_refusal`: why a path may not be a hub id.

        None: it may.
        """
        self._memory = memory
        self._config = config
        self._form = form
        self._hub_refusal = hub_refusal

    @property
    def num_slots(self) -> int:
        return self._memory.shape.num_slots - 1

    def read(self, path: str) -> tuple[Adapter, Any]:
        """An adapter, and what the memory makes of it. ValueError that names what is wrong."""
        folder = find_adapter(path, hub_refusal=self._hub_refusal)
        adapter = read_adapter(folder, self._config, max_rank=self._memory.shape.max_rank, form=self._form)
        return adapter, self._memory.prepare(adapter)

    def stage(self, path: str) -> StagedAdapter:
        return StagedAdapter(path, lambda: self.read(path))

    def fill(self, slot: int, prepared: Any) -> None:
        """Put what `read` returned second in a slot."""
        self._memory.place(slot, prepared)

    def place(self, slot: int, staged: StagedAdapter) -> None:
        self._memory.place(slot, staged.prepared)

    def clear(self, slot: int) -> None:
        self._memory.clear(slot)
