"""The parameters of a flush: from the query, or from a JSON body (docs/design.md, section 6)."""

from collections.abc import Callable, Iterable
from typing import Any

from headwater.client.engine_client import new_call_id
from headwater.generation.body import likely_meant
from headwater.generation.errors import ApiError, bad_request
from headwater.generation.text_generation import TextGenerator
from headwater.generation.token_arrays import first_outside
from headwater.generation.validation import check_name, check_unicode, timeout_seconds
from headwater.http_api.json_body import parse_json
from headwater.messages.base import pack_ids
from headwater.messages.control import FlushCache

MODES = ("idle", "now", "drain")
TIERS = ("device", "host", "storage")
NAMES = (
    "timeout",
    "mode",
    "tiers",
    "cache_salt",
    "extra_key",
    "lora_path",
    "prefix",
    "prefix_ids",
    "hold",
    "dry_run",
    "model",
)
_NO_SCOPE = ("lora_name", "adapter_id")
ClientParameters = dict[str, Any]  # what the client sent, by name, unchecked


def client_parameters(query: Iterable[tuple[str, str]], body: bytes) -> ClientParameters:
    """The parameters by name, unchecked. ApiError if a name comes twice or the body is no object."""
    sent: ClientParameters = {}
    for name, value in [*query, *_body_items(body)]:
        if name not in NAMES and (meant := likely_meant(name, NAMES)) is not None:
            # an ignored scope would flush everything
            raise bad_request(name, f"{name}: not known; did you mean {meant}?", code="unknown_parameter")
        if name in _NO_SCOPE:  # nor may these be ignored
            raise bad_request(name, f"{name}: name the LoRA adapter in lora_path")
        if name not in NAMES or value is None:
            continue
        if name in sent:
            raise bad_request(name, f"{name}: given twice; give it once, in the query or in the body")
        sent[name] = value
    return sent


async def flush_message(sent: ClientParameters, generator: TextGenerator, *, max_timeout_s: float) -> FlushCache:
    """The checked message. InvalidRequest names the parameter and what it accepts."""
    message = FlushCache(
        call_id=new_call_id(),
        timeout_s=_checked(sent, "timeout", lambda value: timeout_seconds(value, max_timeout_s), 0.0),
        mode=_checked(sent, "mode", _mode, "idle"),
        tiers=_checked(sent, "tiers", _tiers, ()),
        cache_salt=_checked(sent, "cache_salt", _name, None),
        extra_key=_checked(sent, "extra_key", _name, None),
        lora_name=_checked(sent, "lora_path", _name, None),
        prefix_ids=await _prefix(sent, generator),
        hold=_checked(sent, "hold", _flag, False),
        dry_run=_checked(sent, "dry_run", _flag, False),
    )
    if message.names_prefix_of_store:
        name = "prefix" if "prefix" in sent else "prefix_ids"
        raise bad_request(name, f"{name}: storage cannot be flushed by prefix, its keys are hashes; leave it out")
    if message.names_adapter_of_store:
        text = "lora_path: storage cannot be flushed by adapter; leave it out, or flush by salt or key"
        raise bad_request("lora_path", text)
    return message


def _body_items(body: bytes) -> list[tuple[str, Any]]:
    if not body.strip():
        return []
    parsed = parse_json(body, pairs=list)  # pairs, so that a repeated name is seen
    if not isinstance(parsed, list) or not body.lstrip().startswith(b"{"):
        raise ApiError(400, "the body must be a JSON object or empty", code="invalid_body")
    return parsed


def _checked(sent: ClientParameters, name: str, check: Callable[[Any], Any], default: Any) -> Any:
    if name not in sent:
        return default
    try:
        return check(sent[name])
    except ValueError as error:
        raise bad_request(name, f"{name}: {error}") from None


def _mode(value: Any) -> str:
    if value not in MODES:
        raise ValueError(f"must be one of {', '.join(MODES)}, got {value!r}")
    return value


def _tiers(value: Any) -> tuple[str, ...]:
    tiers = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(tiers, list) or not tiers or any(tier not in TIERS for tier in tiers):
        raise ValueError(f"must be any of {', '.join(TIERS)}, separated by commas, got {value!r}")
    return tuple(tier for tier in TIERS if tier in tiers)


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, got {value!r}")
    return check_name(value)


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in known:
        raise ValueError(f"must be true or false, got {value!r}")
    return known[value.lower()]


async def _prefix(sent: ClientParameters, generator: TextGenerator) -> bytes | None:
    """The prefix as packed ids, without the last token of a text: more text behind it may split it differently."""
    if "prefix" in sent and "prefix_ids" in sent:
        raise bad_request("prefix", "prefix: give either prefix or prefix_ids, not both")
    if "prefix_ids" in sent:
        vocab_size = generator.tokenizer.vocab_size
        ids = _checked(sent, "prefix_ids", lambda value: _token_ids(value, vocab_size), [])
        return pack_ids(ids)
    if "prefix" not in sent:
        return None
    text = _checked(sent, "prefix", _text, "")
    ids = (await generator.encode(text, param="prefix"))[:-1]
    if not ids:
        raise bad_request("prefix", "prefix: must be at least two tokens long")
    return pack_ids(ids)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text that is not empty")
    return check_unicode(value)


def _token_ids(value: Any, vocab_size: int) -> list[int]:
    expected = f"must be token ids from 0 to {vocab_size - 1}"
    try:
        ids = [int(part) for part in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{expected}, separated by commas, got {value!r}") from None
    if not isinstance(ids, list) or not ids or any(type(token_id) is not int for token_id in ids):
        raise ValueError(f"{expected}, at least one, got {value!r}")
    if (outside := first_outside(ids, vocab_size)) is not None:
        raise ValueError(f"{expected}, got {outside}")
    return ids
