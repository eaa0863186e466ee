"""The server's arguments: one struct that the command line, the Python API and the engine process share.

Every field carries its own `Flag`: help text, range and section. `cli/serve.py` makes the command line options
from these flags, and `ServerArgs` checks its values against them. So each flag is defined in one place.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from headwater.launch.flags import Flag, FlagSpec, flag_name, read_flags
from headwater.messages.choices import PrefetchPolicyName, StoreKind, WritePolicyName

MODEL = "Model"
HTTP = "HTTP server"
CACHE = "KV cache"
TIERED = "KV cache tiers"
SCHEDULE = "Scheduling"
PROCESS = "Processes"

MIB = 1 << 20
ENDPOINT = re.compile(r"tcp://[^/:]+:\d{1,5}|tcp://\[[0-9a-fA-F:]+\]:\d{1,5}|ipc:///.+")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/:?#@\s\[\]]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?", re.IGNORECASE)
HOST = re.compile(r"[^/:?#@\s\[\]]+|[0-9a-f:]+", re.IGNORECASE)
GB = 10**9


@dataclass(frozen=True, slots=True)
class _DeviceDefaults:
    running: int  # requests
    chunk: int  # prompt tokens of one request in a step
    mem_fraction: float | None


_DEVICE_DEFAULTS = {
    "cpu": _DeviceDefaults(running=64, chunk=512, mem_fraction=None),
    "cuda": _DeviceDefaults(running=256, chunk=8192, mem_fraction=0.9),
}


class ServerArgs(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The arguments of a server. `None` stands for a default that depends on the model or the device.

    Raises `ValueError` that names the flag and its range if a value is out of range.
    """

    model: Annotated[
        str | None,
        Flag(
            "A Hugging Face folder or hub id, or a .gguf file. Default: SmolLM2-135M-Instruct.",
            MODEL,
            also=("--model-path",),
        ),
    ] = None
    served_model_name: Annotated[str | None, Flag("The model's name in the APIs. Default: from --model.", MODEL)] = None
    tokenizer: Annotated[
        str | None,
        Flag("Load the tokenizer from here instead of --model.", MODEL, also=("--tokenizer-path",)),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag("Data type of weights and activations. auto: bfloat16 where it is fast, else float32.", MODEL),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8", "int4"],
        Flag(
            "Quantise the matrices of the weights to 8 or 4 bits when they are loaded, on a CPU. Blocks of a GGUF file "
            "are not quantised again.",
            MODEL,
        ),
    ] = "none"
    attention_backend: Annotated[
        Literal["auto", "triton", "fa3"],
        Flag("Attention kernels for long prompts on a GPU. auto: fa3 if it is available.", MODEL),
    ] = "auto"
    cuda_graph_max_bs: Annotated[
        int | None,
        Flag(
            "Largest decode batch captured as a CUDA graph. Default: --max-running-requests.",
            MODEL,
            low=1,
            high=4096,
        ),
    ] = None
    disable_cuda_graph: Annotated[bool, Flag("Run every step without CUDA graphs.", MODEL)] = False
    load_format: Annotated[
        Literal["auto", "safetensors", "gguf", "dummy"],
        Flag("Format of the weights. dummy: random weights from a config.json, for benchmarks.", MODEL),
    ] = "auto"
    weights_cache_size: Annotated[
        float, Flag("GB on disk for packed weights, which later starts on a CPU map. 0: none are kept.", MODEL, low=0)
    ] = 16.0
    keep_weights_on_host: Annotated[
        bool,
        Flag("Keep released weights in host memory, and resume them from there.", MODEL),
    ] = False
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Flag("Where the model runs. auto: an NVIDIA GPU if there is one.", MODEL)
    ] = "auto"
    context_length: Annotated[
        int | None, Flag("Longest prompt plus output, in tokens. Default: the model's own.", MODEL, low=1)
    ] = None
    random_seed: Annotated[int, Flag("Seed of dummy weights.", MODEL, low=0, high=2**63 - 1)] = 0
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        Flag(
            "Sampling parameters of /v1 requests that do not set them. model: the recommendation in the model's files "
            "(generation_config.json, GGUF metadata). openai: temperature 1 and nothing else.",
            MODEL,
        ),
    ] = "model"
    parse_special_tokens: Annotated[
        Literal["never", "prompts", "always"],
        Flag(
            "Where the spelling of a control token (<|im_end|>) in a request becomes that token. prompts: in text "
            "prompts, but not in chat messages. A request's own parse_special_tokens wins.",
            MODEL,
        ),
    ] = "prompts"
    weight_version: Annotated[str, Flag("Your label for the weights, reported in answers.", MODEL)] = "default"

    allow_hub: Annotated[
        bool,
        Flag(
            "Let /update_weights_from_disk fetch hub ids from the network. Implied when --model is a hub id.", MODEL
        ),
    ] = False

    host: Annotated[str, Flag("Address to listen on.", HTTP)] = "127.0.0.1"
    port: Annotated[int, Flag("Port to listen on; 0 takes a free one.", HTTP, low=0, high=65535)] = 30000
    api_key: Annotated[
        str | None,
        Flag("Key that clients must send as a Bearer token.", HTTP, env="HEADWATER_API_KEY", is_secret=True),
    ] = None
    admin_api_key: Annotated[
        str | None,
        Flag(
            "Key for the control routes (flush, pause, abort).",
            HTTP,
            env="HEADWATER_ADMIN_API_KEY",
            is_secret=True,
        ),
    ] = None
    allowed_origin: Annotated[
        str | None,
        Flag(
            "Origins of web pages that may use the server, such as https://chat.example, separated by commas, or *. "
            "Default: only the server's own pages.",
            HTTP,
        ),
    ] = None
    allowed_host: Annotated[
        str | None,
        Flag(
            "Additional host names of this server, separated by commas, or *. By default, names are checked only if "
            "the server listens on a loopback address without --api-key.",
            HTTP,
        ),
    ] = None
    max_body_bytes: Annotated[
        int, Flag("Largest accepted request body, in bytes.", HTTP, low=1024, high=1 << 30)
    ] = 4 * MIB
    max_header_bytes: Annotated[
        int, Flag("Largest accepted total of a request's URL and headers, in bytes.", HTTP, low=1024, high=16 * MIB)
    ] = 64 << 10
    header_timeout: Annotated[
        float,
        Flag("Seconds within which a client must send the headers of a request.", HTTP, low=0.1, high=3600),
    ] = 10.0
    max_connections: Annotated[
        int | None,
        Flag(
            "Most open connections; one more replaces an idle connection, or gets 503. Default: as many as the limit "
            "on open files permits, at most 16384.",
            HTTP,
            low=1,
            high=1_000_000,
        ),
    ] = None
    max_control_timeout: Annotated[
        float,
        Flag("Longest timeout of a control request, in seconds.", HTTP, low=0, high=86400),
    ] = 3600.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Flag("Lowest level of log messages.", HTTP)
    ] = "info"

    page_size: Annotated[int, Flag("Tokens in a page, the unit of the KV cache.", CACHE, low=1, high=1024)] = 16
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8_e4m3", "fp8_e5m2"],
        Flag("Data type of keys and values. auto: that of --dtype; fp8: half the memory of 16 bits.", CACHE),
    ] = "auto"
    kv_cache_memory_mb: Annotated[
        int | None,
        Flag(
            "Memory for the KV cache in MiB. Default on CPU: 384, or 8,192 tokens if that is more; on a GPU see "
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
    kv_events_kept: Annotated[
        int, Flag("Batches of events kept for such requests.", TIERED, low=1, high=10_000_000)
    ] = 10_000

    max_running_requests: Annotated[
        int | None, Flag("Most running requests. Default: 64 on CPU, 256 on a GPU.", SCHEDULE, low=1, high=4096)
    ] = None
    max_queued_requests: Annotated[
        int, Flag("Most waiting requests; one more gets 429.", SCHEDULE, low=0, high=1_000_000)
    ] = 1024
    chunked_prefill_size: Annotated[
        int | None,
        Flag("Most prompt tokens of one request in a step. Default: 8192; on CPU 512 or less.", SCHEDULE, low=1),
    ] = None
    max_step_tokens: Annotated[
        int | None,
        Flag(
            "Most tokens of a step, prefill and decode together. Default: chunk size plus running requests.",
            SCHEDULE,
            low=1,
            also=("--max-prefill-tokens",),
        ),
    ] = None
    schedule_policy: Annotated[
        Literal["fcfs", "lpm"],
        Flag("Order of the queue: first come first served, or longest prefix match.", SCHEDULE),
    ] = "fcfs"

    threads: Annotated[
        int | None,
        Flag(
            "Compute threads of each engine. Default: the available cores, divided among the engines.",
            PROCESS,
            low=1,
            high=1024,
        ),
    ] = None
    pin_threads: Annotated[
        Literal["auto", "on", "off"],
        Flag(
            "Keep compute threads on cores of their own, and the API process off these cores. auto: with 4 cores or "
            "more, if all of them compute.",
            PROCESS,
        ),
    ] = "auto"
    engine_restarts: Annotated[
        int,
        Flag(
            "Restarts of each engine process before the server gives up.",
            PROCESS,
            low=0,
            high=1000,
        ),
    ] = 0
    dp_size: Annotated[
        int,
        Flag(
            "Engine processes (replicas), each with its own weights and KV cache.",
            PROCESS,
            low=1,
            high=64,
            also=("--data-parallel-size", "--dp"),
        ),
    ] = 1

    def __post_init__(self) -> None:
        for name, spec in FLAGS.items():
            spec.check(getattr(self, name))
        for name in ("model", "served_model_name", "tokenizer", "host", "api_key", "admin_api_key"):
            if getattr(self, name) == "":
                raise ValueError(f"{flag_name(name)} must not be empty")
        self._check_tiers()
        self._check_events()
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and ORIGIN.fullmatch(origin.rstrip("/")) is None:
                raise ValueError(f"--allowed-origin must be origins such as https://chat.example, got {origin!r}")
        for host in self.allowed_hosts:
            if host != "*" and HOST.fullmatch(host) is None:
                raise ValueError(f"--allowed-host must be names without scheme and port, got {host!r}")

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        return _names(self.allowed_origin)

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        return _names(self.allowed_host)

    def _check_events(self) -> None:
        for name in ("kv_events_endpoint", "kv_events_replay_endpoint"):
            value = getattr(self, name)
            if value is not None and ENDPOINT.fullmatch(value) is None:
                raise ValueError(f"{flag_name(name)} must be tcp://ADDRESS:PORT or ipc:///PATH, got {value!r}")
        if self.kv_events_replay_endpoint is not None and self.kv_events_endpoint is None:
            raise ValueError("--kv-events-replay-endpoint needs --kv-events-endpoint")

    def _check_tiers(self) -> None:
        kind = self.hicache_storage_backend
        if kind is not None and not self.enable_hierarchical_cache:
            raise ValueError("--hicache-storage-backend needs --enable-hierarchical-cache")
        if self.enable_hierarchical_cache and self.disable_radix_cache:
            raise ValueError("--enable-hierarchical-cache does not go with --disable-radix-cache")
        for name, wanted in (("hicache_storage_dir", "file"), ("hicache_storage_url", "redis")):
            if (getattr(self, name) is not None) != (kind == wanted):
                raise ValueError(f"{flag_name(name)} and --hicache-storage-backend {wanted} go together")

    def public(self) -> dict[str, Any]:
        """All arguments by field name, with secrets masked, for /server_info."""
        values = {name: getattr(self, name) for name in FLAGS}
        return {name: "***" if v is not None and FLAGS[name].flag.is_secret else v for name, v in values.items()}

    def for_one_engine(self, num_threads: int) -> "ServerArgs":
        """The arguments of one of the `dp_size` engines, with its threads and its share of memory."""
        share = self.mem_fraction_static
        if share is not None and self.dp_size > 1:
            share = max(share / self.dp_size, 0.01)
        return msgspec.structs.replace(self, threads=num_threads, mem_fraction_static=share)

    def for_device(self, device: str) -> "ServerArgs":
        """The arguments with the defaults of a device (`"cpu"` or `"cuda"`) filled in."""
        if device not in _DEVICE_DEFAULTS:
            raise ValueError(f"no defaults are known for device {device!r}; known: {', '.join(_DEVICE_DEFAULTS)}")
        defaults = _DEVICE_DEFAULTS[device]
        running = self.max_running_requests or defaults.running
        chunk = self.chunked_prefill_size or defaults.chunk
        # with large chunks, decodes share the chunk's budget: a few tokens more would need another tile
        step = chunk + running if device == "cpu" else max(chunk, running)
        share = defaults.mem_fraction and defaults.mem_fraction / self.dp_size
        sized = self.kv_cache_memory_mb or self.max_total_tokens or self.mem_fraction_static
        return msgspec.structs.replace(
            self,
            device=device,
            max_running_requests=running,
            chunked_prefill_size=chunk,
            max_step_tokens=self.max_step_tokens or step,
            mem_fraction_static=self.mem_fraction_static if sized else share,
        )


def _names(listed: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (listed or "").split(",") if name.strip())


FLAGS: dict[str, FlagSpec] = read_flags(ServerArgs)  # by field name, in the order of the struct
