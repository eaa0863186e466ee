"""Parts of answers that all APIs share."""

from typing import Any

import msgspec

from headwater.messages.generation import OutputMeta

Json = dict[str, Any]  # a JSON object

json_bytes = msgspec.json.Encoder().encode


def cached_tokens(meta: OutputMeta | None) -> int:
    return 0 if meta is None else meta.cached_device + meta.cached_host + meta.cached_storage


def cached_tokens_details(meta: OutputMeta | None) -> dict[str, int]:
    """Prompt tokens found in the cache, by tier."""
    if meta is None:
        return {"device": 0, "host": 0, "storage": 0}
    return {"device": meta.cached_device, "host": meta.cached_host, "storage": meta.cached_storage}
