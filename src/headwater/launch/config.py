"""The server's arguments: one struct that the command line, the Python API and the engine process share.

Every field carries its own `Flag`: help text, range and section. The fields are in `model_args.py`, `http_args.py`,
`cache_args.py` and `engine_args.py`, each of which extends the one before. `cli/serve.py` makes the command line
options from the flags, and `ServerArgs` checks its values against them. So each flag is defined in one place.
"""

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from headwater.launch.engine_args import EngineArgs
from headwater.launch.flags import FlagSpec, flag_name, read_flags
from headwater.messages.choices import SpeculativeAlgorithmName

MIB = 1 << 20
ENDPOINT = re.compile(r"tcp://[^/:]+:\d{1,5}|tcp://\[[0-9a-fA-F:]+\]:\d{1,5}|ipc:///.+")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/:?#@\s\[\]]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?", re.IGNORECASE)
HOST = re.compile(r"[^/:?#@\s\[\]]+|[0-9a-f:]+", re.IGNORECASE)
GB = 10**9
_SPARE_ADAPTER_SLOTS = 2


@dataclass(frozen=True, slots=True)
class _DeviceDefaults:
    running: int  # requests
    chunk: int  # prompt tokens of one request in a step
    mem_fraction: float | None


_DEVICE_DEFAULTS = {
    "cpu": _DeviceDefaults(running=64, chunk=512, mem_fraction=None),
    "cuda": _DeviceDefaults(running=256, chunk=8192, mem_fraction=0.9),
}


class ServerArgs(EngineArgs, kw_only=True, frozen=True, omit_defaults=True):
    """The arguments of a server. `None` stands for a default that depends on the model or the device.

    Raises `ValueError` that names the flag and its range if a value is out of range.
    """

    def __post_init__(self) -> None:
        for name, spec in FLAGS.items():
            spec.check(getattr(self, name))
        for name in ("model", "served_model_name", "tokenizer", "host", "api_key", "admin_api_key"):
            if getattr(self, name) == "":
                raise ValueError(f"{flag_name(name)} must not be empty")
        if self.api_key is not None and not self.api_keys:
            raise ValueError("--api-key must not be empty")
        self._check_tiers()
        self._check_events()
        self._check_replica()
        if self.allow_pickled_tensors and self.admin_api_key is None:
            raise ValueError("--allow-pickled-tensors needs --admin-api-key")
        self._check_adapters()
        default = FLAGS["speculative_num_draft_tokens"].default
        if self.speculative_num_draft_tokens != default and self.speculative_algorithm == "none":
            raise ValueError("--speculative-num-draft-tokens needs --speculative-algorithm")
        if self.flush_default_timeout > self.max_control_timeout:
            longest = f"--max-control-timeout, {self.max_control_timeout:g}"
            raise ValueError(f"--flush-default-timeout must be at most {longest}, got {self.flush_default_timeout:g}")
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and ORIGIN.fullmatch(origin.rstrip("/")) is None:
                raise ValueError(f"--allowed-origin must be origins such as https://chat.example, got {origin!r}")
        for host in self.allowed_hosts:
            if host != "*" and HOST.fullmatch(host) is None:
                raise ValueError(f"--allowed-host must be names without scheme and port, got {host!r}")

    @property
    def api_keys(self) -> tuple[str, ...]:
        return _names(self.api_key)

    @property
    def queue_share(self) -> float:
        """The share of the queue that one key may hold."""
        return self.max_queue_share or (0.5 if len(self.api_keys) > 1 else 1.0)

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
        for name in ("kv_events_replay_endpoint", "kv_events_format", "kv_events_topic"):
            if getattr(self, name) != FLAGS[name].default and self.kv_events_endpoint is None:
                raise ValueError(f"{flag_name(name)} needs --kv-events-endpoint")

    @property
    def speculation(self) -> SpeculativeAlgorithmName:
        """The algorithm by its own name."""
        return "ngram" if self.speculative_algorithm == "NGRAM" else self.speculative_algorithm

    @property
    def serves_adapters(self) -> bool:
        return self.enable_lora or self.lora_paths is not None

    @property
    def num_adapter_slots(self) -> int:
        """Contents in memory: one more than names, so that an adapter in use can be replaced."""
        return self.max_loras_per_batch + _SPARE_ADAPTER_SLOTS

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters to load at the start: path by name."""
        pairs = [pair.partition("=") for pair in _names(self.lora_paths)]
        return {name.strip(): path.strip() for name, _, path in pairs}

    def _check_adapters(self) -> None:
        pairs = [pair.partition("=") for pair in _names(self.lora_paths)]
        if any(not (name.strip() and path.strip()) for name, _, path in pairs) or (self.lora_paths and not pairs):
            raise ValueError(f"--lora-paths must be NAME=PATH, separated by commas, got {self.lora_paths!r}")
        if len(self.adapters) < len(pairs):
            raise ValueError(f"--lora-paths names an adapter twice: {self.lora_paths!r}")
        if len(pairs) > self.max_loras_per_batch:
            raise ValueError(f"--lora-paths names {len(pairs)} adapters, --max-loras-per-batch is less")

    def _check_replica(self) -> None:
        if not self.fleet_replica:
            return
        if self.admin_api_key is None:
            raise ValueError("--fleet-replica needs --admin-api-key")
        for name, wanted in (("dp_size", 1), ("engine_restarts", 0)):
            if getattr(self, name) != wanted:  # the fleet alone brings an engine to the desired state
                raise ValueError(f"--fleet-replica needs {flag_name(name)} {wanted}")

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
        """The arguments of one of the `dp_size` engines, with its threads."""
        return msgspec.structs.replace(self, threads=num_threads)

    def for_device(self, device: str) -> "ServerArgs":
        """The arguments with the defaults of a device (`"cpu"` or `"cuda"`) filled in, of one engine.

        The device's memory is that of `dp_size` engines, which is 1 afterwards.
        """
        if device not in _DEVICE_DEFAULTS:
            raise ValueError(f"no defaults are known for device {device!r}; known: {', '.join(_DEVICE_DEFAULTS)}")
        defaults = _DEVICE_DEFAULTS[device]
        running = self.max_running_requests or defaults.running
        chunk = self.chunked_prefill_size or defaults.chunk
        # with large chunks, decodes share the chunk's budget: a few tokens more would need another tile
        step = chunk + running if device == "cpu" else max(chunk, running)
        share = self.mem_fraction_static
        if share is None and not self.kv_cache_memory_mb and not self.max_total_tokens:
            share = defaults.mem_fraction
        return msgspec.structs.replace(
            self,
            device=device,
            max_running_requests=running,
            chunked_prefill_size=chunk,
            max_step_tokens=self.max_step_tokens or step,
            mem_fraction_static=share and max(share / self.dp_size, 0.01),
            dp_size=1,
        )


def _names(listed: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (listed or "").split(",") if name.strip())


FLAGS: dict[str, FlagSpec] = read_flags(ServerArgs)  # by field name, in the order of the struct
