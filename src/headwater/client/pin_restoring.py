"""Pins of a restarted engine: each prefix is computed, then pinned again."""

import asyncio
import logging

import msgspec

from headwater.client.desired_state import DesiredPin
from headwater.client.errors import CallFailed, EngineGone
from headwater.client.link import EngineLink, new_call_id
from headwater.messages.generation import Generate, RequestOptions, SamplingParams

log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0  # to compute a prefix, and to pin it
_SHORTEST_TTL_S = 1e-9


async def set_pin(link: EngineLink, pin: DesiredPin) -> None:
    """Compute a prefix and pin it. A pin without room is dropped with a warning: it costs time, not correctness."""
    prefix, clock = pin.message, asyncio.get_running_loop().time
    request = Generate(
        rid=f"pin-{new_call_id()}",
        prompt_ids=prefix.prompt_ids,
        sampling=SamplingParams(max_new_tokens=0, temperature=0.0),
        options=RequestOptions(
            cache_salt=prefix.cache_salt, extra_key=prefix.extra_key, lora_name=prefix.lora_name
        ),
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            async for _ in link.generate(request):
                pass
        ttl_s = max(_SHORTEST_TTL_S, pin.ends_at_s - clock())
        again = msgspec.structs.replace(prefix, call_id=new_call_id(), ttl_s=ttl_s, expires_at_s=None)
        await link.call(again, timeout_s=_TIMEOUT_S)
    except (EngineGone, CallFailed, TimeoutError) as error:
        log.warning("engine %d: pin %s could not be set again: %s", link.index, prefix.pin_id, error or "no answer")
