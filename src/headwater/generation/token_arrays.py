"""Token ids of requests as int32 arrays, and the check that they are in the vocabulary.

A prompt of 100,000 ids must not hold up other requests, and the API process does without numpy. Here an array costs a
third of `array("i", ids)`, and the check looks at no single id.
"""

import struct
import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from headwater.messages.base import TokenArray

_BITS = 32


def int32_array(token_ids: Any) -> TokenArray:
    """TypeError for anything but a list of integers, OverflowError for an integer beyond int32."""
    if not isinstance(token_ids, list):
        raise TypeError("not a list")
    found = array("i")
    try:
        found.frombytes(struct.pack(f"{len(token_ids)}i", *token_ids))
    except struct.error:
        return array("i", token_ids)  # raises the right one of both
    return found


def first_outside(token_ids: Sequence[int] | TokenArray, vocab_size: int) -> int | None:
    """The first id that is not in [0, vocab_size), or None."""
    if not token_ids:
        return None
    if isinstance(token_ids, array):
        if _are_inside(token_ids, vocab_size):
            return None
    elif min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return None
    return next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)


def _are_inside(token_ids: TokenArray, vocab_size: int) -> bool:
    """Whether all ids are in [0, vocab_size), of which one addition decides.

    All ids are one long integer with a field of 32 bits for each. If the highest bit of no field is set, no id is
    negative. Then 2**31 - vocab_size is added to each field, which sets that bit where an id is too large.
    """
    highest = _repeated(1 << (_BITS - 1), len(token_ids))
    fields = int.from_bytes(token_ids.tobytes(), sys.byteorder)
    if fields & highest:
        return False
    return not (fields + _repeated((1 << (_BITS - 1)) - vocab_size, len(token_ids))) & highest


@lru_cache(maxsize=16)
def _repeated(value: int, num: int) -> int:
    """A long integer with `num` fields, all of this value."""
    return int.from_bytes(value.to_bytes(_BITS // 8, sys.byteorder) * num, sys.byteorder)
