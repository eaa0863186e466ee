"""The adapters of a runner, for the control plane (control.ports.AdaptersPort)."""

from collections.abc import Callable
from typing import Any

from headwater.devices.adapters import Adapter, AdapterMemory
from headwater.models.adapters.adapter import find_adapter, read_adapter
from headwater.models.config import ModelConfig
from headwater.models.ranks.adapter_share import cut_adapter
from headwater.models.ranks.share import WHOLE, ModelShare
from headwater.staged_read import StagedRead


class StagedAdapter(StagedRead[tuple[Adapter, Any]]):
    """An adapter that a thread reads, checks and converts for the device (`control.ports.StagedAdapter`)."""

    def __init__(self, path: str, read: Callable[[], tuple[Adapter, Any]]) -> None:
        self.path = path
        super().__init__(lambda _: read(), name="stage-adapter")

    @property
    def adapter_id(self) -> str:
        return self.found()[0].adapter_id

    @property
    def rank(self) -> int:
        return self.found()[0].rank

    @property
    def num_bytes(self) -> int:
        return self.found()[0].num_bytes

    @property
    def prepared(self) -> Any:
        """What the memory's `prepare` made of it."""
        return self.found()[1]


class AdapterStore:
    """Reads adapters for a model, and puts them in the slots of a memory."""

    def __init__(
        self,
        memory: AdapterMemory,
        config: ModelConfig,
        *,
        form: str,
        share: ModelShare = WHOLE,
        hub_refusal: str | None = "hub ids are not fetched",
    ) -> None:
        """`form`: the format in which adapters are served. `share`: what this rank keeps of each.

        `hub_refusal`: why a path may not be a hub id; None: it may.
        """
        self._memory = memory
        self._config = config
        self._form = form
        self._share = share
        self._hub_refusal = hub_refusal

    @property
    def num_slots(self) -> int:
        return self._memory.shape.num_slots - 1

    def read(self, path: str) -> tuple[Adapter, Any]:
        """An adapter, and what the memory makes of this rank's share. ValueError that names what is wrong."""
        folder = find_adapter(path, hub_refusal=self._hub_refusal)
        adapter = read_adapter(folder, self._config, max_rank=self._memory.shape.max_rank, form=self._form)
        return adapter, self._memory.prepare(cut_adapter(adapter, self._config, self._share))

    def stage(self, path: str) -> StagedAdapter:
        return StagedAdapter(path, lambda: self.read(path))

    def place(self, slot: int, staged: StagedAdapter) -> None:
        self._memory.place(slot, staged.prepared)

    def clear(self, slot: int) -> None:
        self._memory.clear(slot)
