"""LoRA adapters while the server runs: load, reload, unload."""

from msgspec import field

from headwater.messages.base import Answer, Call, Struct, TimedCall
from headwater.messages.control import PagesAndBytes


class LoadAdapter(TimedCall, tag="load_adapter", kw_only=True):
    """Read an adapter and serve it under a name, all or nothing. Answered by `AdapterLoaded`.

    With `load_inplace` it may replace the adapter of that name: requests that have begun go on with the old content.
    """

    name: str
    path: str
    load_inplace: bool = False
    timeout_s: float = 600.0
    only_adapter_id: str = ""  # refused (409) if the files hold another adapter; empty: any


class UnloadAdapter(Call, tag="unload_adapter"):
    """Serve no adapter under this name any more. Answered by `AdapterUnloaded`, or `Failed` (404).

    Requests that have begun go on; those that wait end with 404.
    """

    name: str


class AdapterLoaded(Answer, tag="adapter_loaded"):
    """The name means this content now; no request can match KV of the content before."""

    name: str
    adapter_id: str
    rank: int
    num_bytes: int
    generation: int
    num_kept: int = 0  # requests that go on with the content before
    is_changed: bool = True  # the name had no adapter, or one of another content
    waited_s: float = 0.0
    freed: dict[str, PagesAndBytes] = field(default_factory=dict)  # of the content before, by tier
    retired: dict[str, PagesAndBytes] = field(default_factory=dict)


class AdapterUnloaded(Answer, tag="adapter_unloaded"):
    name: str
    adapter_id: str
    generation: int
    num_kept: int = 0  # requests that go on with it
    num_ended: int = 0  # requests that had not begun
    freed: dict[str, PagesAndBytes] = field(default_factory=dict)
    retired: dict[str, PagesAndBytes] = field(default_factory=dict)


class AdapterState(Struct):
    """An adapter that an engine serves. `adapter_id` is a hash of its content."""

    name: str
    path: str
    adapter_id: str
    rank: int
    num_bytes: int
    num_running: int = 0
    num_waiting: int = 0
