"""Bodies of the routes that show, warm and pin the cache, and that attach a store to it."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from headwater.generation.body import Body, Names
from headwater.generation.field_table import REFUSED_OF_PROMPTS
from headwater.generation.prompt_schemas import ChatPrompt
from headwater.generation.request_schemas import NamespaceFields
from headwater.generation.validation import Name, Priority, Text, within
from headwater.messages.choices import PrefetchPolicyName, StoreKind, WritePolicyName

MAX_PIN_S = 30 * 86_400.0
MAX_STORE_BYTES = 1 << 50


class Prefixes(ChatPrompt, NamespaceFields):
    """Prefixes of prompts: exactly one of `text`, `messages` and `input_ids`."""

    names: ClassVar[Names] = Names(refused=REFUSED_OF_PROMPTS)
    text: Text | list[Text] | None = Field(default=None, description="A text, or a list of texts.")
    input_ids: list[int] | list[list[int]] | None = Field(default=None, description="Token ids, or a list of lists.")
    add_generation_prompt: bool = Field(default=False, description="With `messages`: add the header of the answer.")
    lora_path: Name | None = Field(default=None, description="Name of the LoRA adapter that computes them.")
    routed_dp_rank: int | None = Field(default=None, description="Index of the engine; left out: every engine.")


class WarmRequest(Prefixes):
    """Prefixes to compute before requests need them."""

    priority: Priority = Field(default=-100, description="Higher runs first; ordinary requests have 0.")


class PinRequest(Prefixes):
    """A prefix to protect from eviction for a time."""

    ttl_s: Annotated[float, AfterValidator(within(0, MAX_PIN_S, above_low=True))] = Field(
        default=3600.0, description="Seconds until the pin ends by itself."
    )
    tiers: list[Literal["device", "host"]] = Field(
        default=["device"],
        min_length=1,
        description="Tiers that keep the prefix. `storage` cannot be pinned: the store evicts by itself.",
    )
    priority: Priority = Field(default=0, description="Of the computation: higher runs first.")


class StorageBackendRequest(Body):
    """A store to attach: SGLang's names, or ours (`directory`, `url`, `size`)."""

    hicache_storage_backend: StoreKind = Field(description="Kind of the store.")
    hicache_storage_backend_extra_config_json: dict[str, Any] | Text | None = Field(
        default=None, description="`directory`, `url` and `size` as a JSON object, or as its text."
    )
    hicache_storage_prefetch_policy: PrefetchPolicyName | None = Field(
        default=None, description="How long a request waits for its pages; left out: unchanged."
    )
    hicache_write_policy: WritePolicyName | None = Field(
        default=None, description="When pages are copied from the device to the host; left out: unchanged."
    )
    directory: Text | None = Field(default=None, description="Folder of the file store.")
    url: Text | None = Field(default=None, description="Address of the redis store.")
    size: Any = Field(default=None, description="Capacity of the store: bytes, or `200MB`, `16GiB`.")
    timeout: Any = Field(default=None, description="Seconds to wait for the store to open; default 30.")
