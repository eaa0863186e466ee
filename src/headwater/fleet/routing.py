"""Which replica gets a request: by the text that it begins with, without a tokenizer, or by load."""

from typing import Any

import msgspec

from headwater.client.engine_choice import choose_engine
from headwater.client.prefix_routes import PrefixRoutes
from headwater.fleet.replica import Replica
from headwater.messages.generation import Generate, RequestOptions, SamplingParams

_BEFORE = ("tools", "instructions", "system")  # what templates put before the messages
_PROMPTS = ("messages", "input", "prompt", "text", "input_ids")


def routing_key(body: bytes) -> Generate | None:
    """What `PrefixRoutes` compares: texts that begin alike have keys that begin alike. None: nothing to compare."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # the replica says what is wrong with it
    if not isinstance(fields, dict):
        return None
    prompt = next((fields[name] for name in _PROMPTS if fields.get(name)), None)
    if prompt is None:
        return None
    before = [fields[name] for name in _BEFORE if fields.get(name)]
    key = b"".join(msgspec.json.encode(part) for part in (*before, prompt))
    options = RequestOptions(cache_salt=_text(fields.get("cache_salt")), extra_key=_text(fields.get("extra_key")))
    return Generate(rid="", prompt_ids=key, sampling=SamplingParams(), options=options)


def choose_replica(candidates: list[Replica], key: Generate | None, routes: PrefixRoutes) -> Replica:
    """The candidate that knows most of the prompt, unless it is much busier. `routes` learns where it goes."""
    chosen = choose_engine(candidates, routes.known(key) if key is not None else [])
    if key is not None:
        routes.learn(key, chosen.number)
    return chosen


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
