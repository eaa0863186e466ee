"""Facts about the served model, and the limits on one request."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from headwater.generation.errors import model_not_found
from headwater.messages.state import ComputeFacts, EngineReady

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about the served model, known once it has loaded."""

    served_name: str
    model_path: str
    tokenizer_path: str
    architecture: str
    model_type: str
    dtype: str
    device: str
    load_format: str
    vocab_size: int
    max_context: int  # tokens of prompt plus output that fit both the model and the KV cache
    eos_token_ids: tuple[int, ...]
    page_size: int
    num_pages: int
    weight_version: str
    sampling_defaults: Mapping[str, float]  # of parameters that a request to /v1 leaves out
    compute: ComputeFacts | None = None  # how a CPU computes
    hidden_size: int = 0
    pooling: str = "last"  # of embeddings; other words than `last` and `mean` are not supported
    adapters: Callable[[], Mapping[str, str]] = dict  # path of each LoRA adapter that is loaded now, by name
    embedding_dimensions: tuple[int, ...] | None = None  # fewer than `hidden_size`; empty: any; None: none

    @classmethod
    def from_ready(
        cls,
        ready: EngineReady,
        *,
        served_name: str,
        model_path: str,
        tokenizer_path: str,
        model_type: str = "",
        load_format: str = "auto",
        sampling_defaults: Mapping[str, float] = MappingProxyType({}),
        pooling: str = "last",
    ) -> "ModelFacts":
        """Facts that the engine reported, and those that the launcher knows from the files."""
        return cls(
            served_name=served_name,
            model_path=model_path,
            tokenizer_path=tokenizer_path,
            architecture=ready.architecture,
            model_type=model_type,
            dtype=ready.dtype,
            device=ready.device,
            load_format=load_format,
            vocab_size=ready.vocab_size,
            max_context=min(ready.max_context, ready.num_pages * ready.page_size),
            eos_token_ids=ready.eos_token_ids,
            page_size=ready.page_size,
            num_pages=ready.num_pages,
            weight_version=ready.weight_version,
            sampling_defaults=sampling_defaults,
            compute=ready.compute,
            hidden_size=ready.hidden_size,
            pooling=pooling,
            embedding_dimensions=ready.embedding_dimensions,
        )

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a `model` names; "" for the model itself, None if nothing is served under this name."""
        if name in (self.served_name, "default", ""):
            return ""
        return name if name in self.adapters() else None

    def require(self, name: object) -> None:
        """Raises ApiError 404 if a call is about another model than this one and its adapters."""
        if not isinstance(name, str) or self.adapter_of(name) is None:
            raise model_not_found(str(name), self.served_name)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one request. Beyond a limit the answer is a 4xx that names it."""

    max_body_bytes: int = 4 * MIB  # 100,000 token ids are under 1 MiB of JSON
    max_control_timeout_s: float = 3600.0
    health_timeout_s: float = 20.0  # an engine that is silent for longer is unhealthy
    ready_timeout_s: float = 5.0  # an engine that is silent for longer is not ready
    max_batch: int = 512  # prompts in one request
    max_stored_responses: int = 1000  # of /v1/responses, for previous_response_id
    max_stored_response_bytes: int = 64 * MIB
    max_concurrency_per_key: int | None = None  # HTTP requests that generate
