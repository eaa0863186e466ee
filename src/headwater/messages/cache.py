"""Calls about stores, pins and the prefix tree."""

from typing import Literal

from msgspec import field

from headwater.messages.base import Answer, Call, Struct, TimedCall
from headwater.messages.choices import PrefetchPolicyName, StoreKind, WritePolicyName


class AttachStorage(TimedCall, tag="attach_storage", kw_only=True):
    """Attach a store below the host tier, or replace the one attached, under traffic. Answered by `StorageInfo`.

    If it names the attached store and a policy, the store stays and only the policies change.
    """

    kind: StoreKind
    directory: str | None = None
    url: str | None = None
    size_bytes: int | None = None
    prefetch_policy: PrefetchPolicyName | None = None  # None: as it is
    write_policy: WritePolicyName | None = None  # None: as it is
    timeout_s: float = 30.0


class PersistCache(TimedCall, tag="persist_cache", kw_only=True):
    """Copy what the device and the host hold to the store, as far as `timeout_s` allows. Answered by `CachePersisted`.

    For a server that ends. Pages that the store has acknowledged before are left out.
    """


class CachePersisted(Answer, tag="cache_persisted"):
    """How many pages were to be copied, how many of them were not, and whether the store has now all of the cache."""

    num_pages: int
    num_dropped: int
    is_whole: bool


class DetachStorage(Call, tag="detach_storage"):
    """Stop using the store, which keeps its pages. Answered by `StorageInfo`. Harmless without a store."""


class GetStorage(Call, tag="get_storage"):
    """Answered by `StorageInfo`."""


class PinPrefix(Call, tag="pin_prefix"):
    """Keep a prefix from being evicted for `ttl_s` seconds. Answered by `Pins` with the new pin, or `Failed`.

    Only pages on the device are pinned (`num_tokens` says how many tokens). With `host` in `tiers` they are copied
    to the host, and held there as the copies arrive. A flush in scope ends a pin. Its device pages give way to a
    request that could not run otherwise (`PinGaveWay`).
    """

    prompt_ids: bytes
    ttl_s: float
    cache_salt: str = ""
    extra_key: str = ""
    lora_name: str = ""
    tiers: tuple[Literal["device", "host"], ...] = ("device",)
    pin_id: str = ""  # its name on every engine; empty: the engine makes one up


class UnpinPrefix(Call, tag="unpin_prefix"):
    """End a pin before its time. Answered by `Done`, or `Failed` (404)."""

    pin_id: str


class GetPins(Call, tag="get_pins"):
    """Answered by `Pins`."""


class GetCacheTree(Call, tag="get_cache_tree"):
    """The prefix tree down to `depth` nodes, the most used children first. Answered by `CacheTree`.

    `blocks`: also all of its blocks, and the position in the stream of events at which they were read.
    """

    depth: int = 3
    max_nodes: int = 1000
    blocks: bool = False
    lora_name: str | None = None  # only what this adapter has computed; "": only the base model alone


class StoreTrouble(Struct):
    """The attached store fails. Requests are served without what it would have given."""

    is_left_alone: bool  # the circuit breaker is not closed: no call is made until a probe succeeds
    failing: tuple[str, ...]  # kinds of calls that fail again and again: look_up, read, write, flush, upkeep
    cause: str  # of the newest failure: unavailable, timeout, deadline, slow, error, full, busy
    details: str  # the error in the store's words; may be empty
    failing_s: float  # since the first of the failures
    retry_in_s: float  # until the next probe; 0 if calls are made


class StorageInfo(Answer, tag="storage_info"):
    """The attached store; `kind` is empty when there is none."""

    kind: str = ""
    prefetch_policy: str = ""
    write_policy: str = ""  # from the device to the host: empty without a host tier
    breaker: str = ""  # closed, open, half_open
    num_pages: int = 0
    num_bytes: int = 0
    capacity_bytes: int | None = None
    in_flight: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)  # of the store and of the breaker
    num_given_up: int = 0  # copies that a detach or replacement gave up
    message: str = ""
    trouble: StoreTrouble | None = None


class PinInfo(Struct):
    pin_id: str
    num_tokens: int
    remaining_s: float
    cache_salt: str = ""
    extra_key: str = ""
    adapter_id: str = ""  # of the content of a LoRA adapter
    tiers: tuple[str, ...] = ("device",)  # where it holds pages; empty: nowhere, since it gave way
    num_host_tokens: int = 0  # held on the host by now; grows to num_tokens if `host` was asked for
    gave_way: str = ""  # why it has given up its device pages; empty: it has not


class Pins(Answer, tag="pins"):
    items: tuple[PinInfo, ...]


class PinGaveWay(Struct, tag="pin_gave_way"):
    """An engine has ended a pin on the device, for a request that needed the pages. It answers no call.

    `tiers`: where the pin still holds pages.
    """

    pin_id: str
    tiers: tuple[str, ...] = ()


class TreeNode(Struct):
    """A node of the prefix tree: a run of pages, how often it was hit, and where it lies."""

    num_tokens: int
    first_ids: tuple[int, ...]  # the first few token ids
    tiers: dict[str, int]  # tier -> pins on its run there
    num_hits: int
    children: tuple["TreeNode", ...] = ()
    num_children: int = 0  # also those left out


class TreeRoot(Struct):
    cache_salt: str
    extra_key: str
    weights_id: str
    num_tokens: int  # in all nodes
    num_nodes: int
    children: tuple[TreeNode, ...]
    adapter_id: str = ""  # of the content of a LoRA adapter


class TreeBlocks(Struct):
    """The blocks of one node, each after its parent. A mirror of the cache's events begins with them."""

    root: int  # whose namespace it is: an index into `CacheTree.roots`
    block_hashes: bytes  # 16 bytes each
    parent: bytes  # hash of the block before; empty at the start of a sequence
    token_ids: bytes  # of all blocks, as `pack_ids` writes them
    tiers: tuple[str, ...]  # device, host


class CacheTree(Answer, tag="cache_tree"):
    roots: tuple[TreeRoot, ...]
    generation: int
    is_cut: bool  # nodes were left out of `roots`; of `blocks` never
    block_size: int = 0
    blocks: tuple[TreeBlocks, ...] = ()  # parents first
    epoch: str = ""  # of the events; empty if none are published
    next_event: int | None = None  # sequence number of the first batch that is not in `blocks` already
