"""The state that all routes share: one object, built by the launcher."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from headwater.client.engine_client import EngineClient
from headwater.generation.chat.formats import ChatFormats, FormatFlags, choose_formats
from headwater.generation.errors import ApiError, loading
from headwater.generation.grammar.texts import GrammarTexts
from headwater.generation.model_facts import ModelFacts, RequestLimits
from headwater.generation.text_generation import SpecialTokenPolicy
from headwater.http_api.monitoring.request_log import RequestLog
from headwater.http_api.monitoring.request_record import RequestRecord
from headwater.http_api.sites import SitePolicy
from headwater.tokenization.tokenizer import Tokenizer
from headwater.transports.staging import StagingArea


@dataclass(frozen=True, slots=True)
class DashboardSettings:
    """The operating page at /dashboard."""

    shows_text: bool = False  # the beginning of cached prompts

    @classmethod
    def of_server(cls, *, is_disabled: bool, shows_text: bool) -> "DashboardSettings | None":
        return None if is_disabled else cls(shows_text)


@dataclass(frozen=True, slots=True)
class FlushDefaults:
    """What a flush means whose client leaves it out: routers drop the parameters."""

    timeout_s: float = 0.0
    mode: Literal["idle", "now", "drain"] = "idle"


@dataclass(slots=True)
class ApiState:
    """Everything the routes share. `tokenizer` and `model` are None while the model loads."""

    client: EngineClient
    server_args: dict[str, object]
    api_key: str | None = None
    admin_api_key: str | None = None
    is_replica: bool = False  # of a fleet, which sends messages to the engine
    limits: RequestLimits = field(default_factory=RequestLimits)
    flush_defaults: FlushDefaults = field(default_factory=FlushDefaults)
    sites: SitePolicy = field(default_factory=SitePolicy)
    dashboard: DashboardSettings | None = field(default_factory=DashboardSettings)  # None: there is no page
    special_tokens: SpecialTokenPolicy = "prompts"  # in which texts special tokens are parsed
    format_flags: FormatFlags = field(default_factory=FormatFlags)
    formats: ChatFormats = field(default_factory=ChatFormats)  # chosen when the model has loaded
    tokenizer: Tokenizer | None = None
    model: ModelFacts | None = None
    grammars: GrammarTexts = field(default_factory=GrammarTexts)
    started_at_s: float = field(default_factory=time.time)  # Unix time
    is_shutting_down: bool = False
    staging: StagingArea = field(default_factory=StagingArea)  # of weights that a trainer sends
    on_request_ended: Sequence[Callable[[RequestRecord], None]] = (RequestLog().ended,)
    allows_pickles: bool = False  # of tensors, in SGLang's form
    stages_on_gpu: bool = False  # received tensors

    def set_ready(self, *, tokenizer: Tokenizer, model: ModelFacts) -> None:
        """The model has loaded: requests are accepted from now on."""
        self.tokenizer = tokenizer
        self.formats = choose_formats(tokenizer.chat_template_source(has_tools=True), self.format_flags)
        self.model = replace(model, adapters=self.client.adapters)

    def set_weight_version(self, weight_version: str) -> None:
        """The label of the weights that the engines serve from now on."""
        if self.model is not None:
            self.model = replace(self.model, weight_version=weight_version)

    @property
    def is_serving(self) -> bool:
        """Whether a request that arrives now would be accepted."""
        return self.model is not None and not self.is_shutting_down and self.client.can_serve

    def require_model(self) -> tuple[Tokenizer, ModelFacts]:
        """Tokenizer and facts. Raises `ApiError` 503 while the model loads or the server ends."""
        if self.is_shutting_down:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self.tokenizer is None or self.model is None:
            raise loading()
        return self.tokenizer, self.model

    def begin_shutdown(self, *, grace_s: float = 1.0) -> None:
        """Refuse new requests from now on; after `grace_s` end running streams with a final error event.

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
