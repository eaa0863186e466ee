"""Flags of the KV cache, its tiers and its events."""

from typing import Annotated, Literal

from headwater.launch.flags import Flag
from headwater.launch.http_args import HttpArgs
from headwater.messages.choices import (
    KvEventsFormat,
    PrefetchPolicyName,
    RestorePolicyName,
    StoreKind,
    WritePolicyName,
)

CACHE = "KV cache"
TIERED = "KV cache tiers"


class CacheArgs(HttpArgs, kw_only=True, frozen=True, omit_defaults=True):
    """The KV cache."""

    page_size: Annotated[int, Flag("Tokens in a page, the unit of the KV cache.", CACHE, low=1, high=1024)] = 16
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8_e4m3", "fp8_e5m2"],
        Flag("Data type of keys and values. auto: that of --dtype; fp8: half the memory of 16 bits.", CACHE),
    ] = "auto"
    kv_cache_memory_mb: Annotated[
        int | None,
        Flag(
            "Memory for the KV cache in MiB. Default on CPU: 352, or 8,192 tokens if that is more; on a GPU see "
            "--mem-fraction-static.",
            CACHE,
            low=1,
        ),
    ] = None
    max_total_tokens: Annotated[
        int | None, Flag("Size of the KV cache in tokens; wins over the flags for memory.", CACHE, low=1)
    ] = None
    mem_fraction_static: Annotated[
        float | None,
        Flag(
            "Share of the device's free memory for weights and KV cache (0 < x < 1). Default on a GPU: 0.9.",
            CACHE,
            low=0.01,
            high=0.99,
        ),
    ] = None
    disable_radix_cache: Annotated[bool, Flag("Do not reuse KV across requests.", CACHE)] = False

    enable_hierarchical_cache: Annotated[
        bool, Flag("Add a tier in host memory below the device's pages.", TIERED)
    ] = False
    hicache_ratio: Annotated[float, Flag("Host pages per device page.", TIERED, low=0.01, high=1000)] = 2.0
    hicache_size: Annotated[
        float, Flag("Size of the host tier in GB; wins over --hicache-ratio. 0: not set.", TIERED, low=0)
    ] = 0.0
    hicache_write_policy: Annotated[
        WritePolicyName,
        Flag("When pages are copied to the host: immediately, at their second use, or on eviction.", TIERED),
    ] = "write_through"
    hicache_restore_policy: Annotated[
        RestorePolicyName,
        Flag("Copy pages back from the host only if that looks quicker than computing them, or always.", TIERED),
    ] = "auto"
    hicache_storage_backend: Annotated[
        StoreKind | None,
        Flag("Add a store below the host tier; its pages survive a restart.", TIERED),
    ] = None
    hicache_storage_dir: Annotated[str | None, Flag("Folder of the file store.", TIERED)] = None
    hicache_storage_url: Annotated[
        str | None, Flag("Address of the Redis or Valkey store.", TIERED, env="HEADWATER_STORAGE_URL", is_secret=True)
    ] = None
    hicache_storage_size: Annotated[
        float | None, Flag("Size of the store in GB. Default: 16; for redis the server's own limit.", TIERED, low=0.001)
    ] = None
    hicache_storage_prefetch_policy: Annotated[
        PrefetchPolicyName,
        Flag("How long a request waits for its pages in the store.", TIERED),
    ] = "timeout"

    kv_events_endpoint: Annotated[
        str | None,
        Flag(
            "Publish the cache's events on this zmq address (tcp://127.0.0.1:5557 or ipc:///path); with several "
            "engines, engine N adds N to the port or .N to the path.",
            TIERED,
        ),
    ] = None
    kv_events_replay_endpoint: Annotated[
        str | None, Flag("Zmq address where subscribers can request events that they missed.", TIERED)
    ] = None
    kv_events_format: Annotated[
        KvEventsFormat,
        Flag("Events as maps with names, or as arrays: vLLM's form before June 2026, without our fields.", TIERED),
    ] = "map"
    kv_events_topic: Annotated[
        str, Flag("First frame of each batch; llm-d wants kv@ADDRESS:PORT@MODEL. Default: empty.", TIERED)
    ] = ""
    kv_events_kept: Annotated[
        int, Flag("Batches of events kept for such requests.", TIERED, low=1, high=10_000_000)
    ] = 10_000
