"""What the routes work with: one explicit object, built by the launcher."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from headwater.client.engine_client import EngineClient
from headwater.http_api.errors import ApiError, loading
from headwater.http_api.sites import SitePolicy
from headwater.http_api.text_generation import SpecialTokenPolicy
from headwater.messages.state import EngineReady
from headwater.tokenization.tokenizer import Tokenizer

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of the served model once it has loaded."""

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
    ) -> "ModelFacts":
        """Facts from the engine's own words and from what the launcher knows of the files."""
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
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for; beyond it the answer is a 4xx that names the limit."""

    max_body_bytes: int = 4 * MIB  # 100,000 token ids are under 1 MiB of JSON
    max_control_timeout_s: float = 3600.0
    health_timeout_s: float = 20.0  # an engine silent for longer is not healthy
    ready_timeout_s: float = 5.0  # one silent for longer does not take a request now
    max_batch: int = 512  # prompts in one request


@dataclass(slots=True)
class ApiState:
    """Everything the routes share. `tokenizer` and `model` are None while the model loads."""

    client: EngineClient
    server_args: dict[str, object]
    api_key: str | None = None
    admin_api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    sites: SitePolicy = field(default_factory=SitePolicy)
    special_tokens: SpecialTokenPolicy = "prompts"  # in which texts spelled out ones are parsed
    tokenizer: Tokenizer | None = None
    model: ModelFacts | None = None
    started_at_s: float = field(default_factory=time.time)  # Unix time
    is_shutting_down: bool = False

    def set_ready(self, *, tokenizer: Tokenizer, model: ModelFacts) -> None:
        """The model has loaded: requests are taken from now on."""
        self.tokenizer = tokenizer
        self.model = model

    def set_weight_version(self, weight_version: str) -> None:
        """The label of the weights that the engines serve from now on."""
        if self.model is not None:
            self.model = replace(self.model, weight_version=weight_version)

    @property
    def is_serving(self) -> bool:
        """Whether a request that arrives now would be taken."""
        return self.model is not None and not self.is_shutting_down and self.client.can_serve

    def require_model(self) -> tuple[Tokenizer, ModelFacts]:
        """Tokenizer and facts. Raises `ApiError` 503 while the model loads or the server ends."""
        if self.is_shutting_down:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self.tokenizer is None or self.model is None:
            raise loading()
        return self.tokenizer, self.model

    def begin_shutdown(self, *, grace_s: float = 1.0) -> None:
        """Take nothing new from now on; after `grace_s` end running streams with a final error event.

        Runs inside the event loop. /health answers 503 at once.
        """
        if self.is_shutting_down:
            return
        self.is_shutting_down = True
        reason = "the server is shutting down"
        self.client.refuse_new(reason)
        if grace_s > 0:
            asyncio.get_running_loop().call_later(grace_s, self.client.refuse_all, reason)
        else:
            self.client.refuse_all(reason)
