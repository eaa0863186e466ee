"""The LoRA adapters that requests may name, and the slots of the runner's memory that hold them.

A name means one content at a time. Requests take the content when they begin and keep it to their end, so an adapter
that was replaced or unloaded stays in its slot until its last request has ended: it is *retired* meanwhile.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class AdapterContent:
    """An adapter in a slot. `adapter_id` is the hash that its KV is kept under."""

    adapter_id: str
    slot: int
    rank: int
    num_bytes: int
    is_retired: bool = False  # no name means it any more


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """What a name means now, and the path that it was loaded from."""

    name: str
    path: str
    content: AdapterContent


class AdapterBoard:
    """Names, contents and slots. Slot 0 is none."""

    def __init__(self, num_slots: int = 0) -> None:
        """`num_slots`: contents that the runner's memory holds; 0: adapters are not served."""
        self.num_slots = num_slots
        self.by_name: dict[str, NamedAdapter] = {}
        self._contents: dict[str, AdapterContent] = {}  # by id
        self._free = list(range(num_slots, 0, -1))
        self.clear_slot: Callable[[int], None] = lambda slot: None  # called when a slot becomes free

    def find(self, name: str) -> AdapterContent | None:
        found = self.by_name.get(name)
        return None if found is None else found.content

    def id_of(self, name: str) -> str | None:
        """The id of what a name means now, "" for the empty name of the base model; None if it means nothing."""
        found = self.find(name)
        return found.adapter_id if found is not None else None if name else ""

    def has(self, adapter_id: str) -> bool:
        """Whether the content is in a slot."""
        return adapter_id in self._contents

    def name_of(self, adapter_id: str) -> str:
        """A name of the content; empty if none means it now."""
        return next((name for name, it in self.by_name.items() if it.content.adapter_id == adapter_id), "")

    @property
    def num_retired(self) -> int:
        return sum(content.is_retired for content in self._contents.values())

    def has_room(self, adapter_id: str, *, replaces: AdapterContent | None, in_use: bool) -> bool:
        """Whether this content can be put in place of another, which requests may still have (`in_use`)."""
        if adapter_id in self._contents or self._free:
            return True
        return replaces is not None and not in_use and self._num_names(replaces) == 1

    def put(self, name: str, path: str, *, adapter_id: str, rank: int, num_bytes: int) -> AdapterContent:
        """`name` means this content from now on. A content without a slot gets one: there must be room."""
        content = self._contents.get(adapter_id)
        if content is None:
            content = AdapterContent(adapter_id, self._free.pop(), rank, num_bytes)
            self._contents[adapter_id] = content
        content.is_retired = False
        self.by_name[name] = NamedAdapter(name, path, content)
        return content

    def remove(self, name: str) -> AdapterContent | None:
        """`name` means nothing from now on. Its content, if no other name means it: it is retired."""
        content = self.by_name.pop(name).content
        if self._num_names(content):
            return None
        content.is_retired = True
        return content

    def free_unused(self, in_use: Iterable[AdapterContent | None]) -> None:
        """Free the slots of retired contents that no request has."""
        if not self.num_retired:
            return
        used = {content.adapter_id for content in in_use if content is not None}
        for adapter_id, content in list(self._contents.items()):
            if content.is_retired and adapter_id not in used:
                del self._contents[adapter_id]
                self._free.append(content.slot)
                self.clear_slot(content.slot)

    def _num_names(self, content: AdapterContent) -> int:
        return sum(each.content is content for each in self.by_name.values())
