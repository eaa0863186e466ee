"""The promises of LoRA adapters: which content computes a request, and what a change of adapters retires.

Contents are followed by the answers of the calls, not by the engine's own books.
"""

from collections.abc import Callable
from typing import Any

from headwater.cache.radix_tree import RadixTree
from headwater.messages.adapters import AdapterLoaded, AdapterUnloaded
from headwater.messages.cache import PinPrefix, Pins
from headwater.messages.control import Failed
from headwater.messages.wire import ToClient
from headwater.simulation.checks.request_model import RequestModel
from headwater.simulation.checks.violation import demand


class AdapterPromises:
    """Follows names and contents of one engine's adapters."""

    def __init__(self, tree: RadixTree, *, content_of: Callable[[int], str]) -> None:
        """`content_of`: the content that the runner computes with in a slot of its adapters; "" in slot 0."""
        self._tree = tree
        self._content_of = content_of
        self.by_name: dict[str, str] = {}  # content by name, as the answers report it
        self._began: list[RequestModel] = []  # in this turn
        self._refused: list[RequestModel] = []  # in this turn, because no adapter has the name
        self._refused_names: list[str] = []  # in this turn, of calls
        self._pinned: list[tuple[str, str]] = []  # in this turn: names, and the contents whose pages are pinned
        self._changed: set[str] = set()  # names of answers of this turn
        self._dropped: list[str] = []  # contents that no name means since an answer of this turn
        self._cut: list[str] = []  # contents whose pages were cut in this turn
        self._is_in_use = False  # an adapter has been loaded

    def entered(self, model: RequestModel, slot: int) -> None:
        """A request enters a slot of the batch, computed with the adapter in `slot`."""
        content = self._content_of(slot)
        if not model.has_started:
            model.use_adapter(content)
            self._began.append(model)
        text = f"{model.rid} began with {model.adapter!r}, has {content!r}"
        demand(content == model.adapter, "keeps_its_adapter", text)

    def refused(self, model: RequestModel) -> None:
        """A request has ended because no adapter has the name that it gives."""
        self._refused.append(model)

    def refused_call(self, name: str | None, failed: Failed) -> None:
        """A call that names an adapter, or none, was refused."""
        if failed.param == "lora_path" and failed.status == 404:
            self._refused_names.append(name or "")

    def pinned(self, message: PinPrefix, answer: Pins) -> None:
        """A prefix was pinned."""
        self._pinned += [(message.lora_name, pin.adapter_id) for pin in answer.items]

    def answered(self, answer: ToClient | Any) -> None:
        """An answer of this turn."""
        if not isinstance(answer, AdapterLoaded | AdapterUnloaded):
            return
        self._is_in_use = True
        self._changed.add(answer.name)
        old = self.by_name.pop(answer.name, None)
        if isinstance(answer, AdapterLoaded):
            self.by_name[answer.name] = answer.adapter_id
            is_changed = old != answer.adapter_id
            demand(answer.is_changed == is_changed, "adapter_changes_are_reported", f"{answer.name}: {old}")
        if old is not None and old not in self.by_name.values():
            self._dropped.append(old)

    def cut(self, content: str) -> None:
        """The pages of a content are cut out of the tree."""
        self._cut.append(content)

    def end_turn(self) -> None:
        """The turn is over, and its answers have been received."""
        for model in self._began:
            name = model.message.options.lora_name
            right = self.by_name.get(name) if name else ""
            text = f"{model.rid} begins with {model.adapter!r}, not {right!r}"
            demand(model.adapter == right, "newest_adapter", text)
        for model in self._refused:
            name = model.message.options.lora_name
            is_there = name in self.by_name and name not in self._changed
            demand(not is_there, "served_if_loaded", f"{model.rid} was refused: {name!r} is loaded")
        for name in self._refused_names:
            is_there = not name or (name in self.by_name and name not in self._changed)
            demand(not is_there, "served_if_loaded", f"a call was refused: {name!r} is loaded")
        for name, content in self._pinned:
            right = self.by_name.get(name) if name else ""
            is_right = content == right or name in self._changed
            demand(is_right, "pins_its_adapter", f"a pin of {name!r} holds pages of {content!r}, not {right!r}")
        self._pinned.clear()
        self._began.clear()
        self._refused.clear()
        self._refused_names.clear()
        self._changed.clear()
        if not self._is_in_use:  # as mostly
            return
        cached = self._cached()
        known = {"", *self.by_name.values()}
        left = {content: count for content, count in cached.items() if content not in known and count}
        demand(not left, "old_adapters_are_retired", f"cached tokens of contents that no name means: {left}")
        demand(self._cut == self._dropped, "old_adapters_are_retired", f"cut {self._cut}, left {self._dropped}")
        self._dropped.clear()
        self._cut.clear()

    def _cached(self) -> dict[str, int]:
        """Tokens in the tree by content."""
        found: dict[str, int] = {}
        for namespace, root in self._tree.roots.items():
            count = sum(len(node.tokens) for node in self._tree.subtree(root))
            found[namespace.adapter] = found.get(namespace.adapter, 0) + count
        return found
