"""The base of all messages, and token ids as bytes.

Token ids travel as packed int32 (`pack_ids`, `unpack_ids`), so that a prompt of 100,000 tokens costs a copy and not
100,000 objects. The API process holds them as `TokenArray`: numpy would take a tenth of its start.
"""

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenIds = npt.NDArray[np.int32]
    TokenArray = array[int]  # of type "i": int32
else:
    TokenIds, TokenArray = Any, array


def pack_ids(token_ids: "Iterable[int] | TokenArray | TokenIds") -> bytes:
    """Token ids as int32 bytes, little-endian as all processors that Headwater runs on."""
    if hasattr(token_ids, "astype"):
        return token_ids.astype("<i4", copy=False).tobytes()  # type: ignore[union-attr]  # numpy's
    return (token_ids if isinstance(token_ids, array) else array("i", token_ids)).tobytes()


def unpack_ids(packed: bytes) -> TokenIds:
    """The inverse of `pack_ids`. int32[n], read-only."""
    import numpy as np

    return np.frombuffer(packed, dtype="<i4")


class Struct(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The base of all messages: immutable, fields by name, defaults left out on the wire."""


class Call(Struct, kw_only=True):
    """The base of what an engine answers under a `call_id`.

    An engine that reads a call at or after `expires_at_s` (on CLOCK_MONOTONIC, which the processes of a host share)
    refuses it, and gives up then what the call began. So a caller that no longer waits can rely on it: nothing is
    done later.
    """

    call_id: str
    expires_at_s: float | None = None  # None: never


class DeferredCall(Call, kw_only=True):
    """The base of calls that may stay pending in the engine. A caller that leaves early cancels them there."""


class TimedCall(DeferredCall, kw_only=True):
    """The base of deferred calls with a deadline: the engine answers `timeout_s` after their arrival at the latest."""

    timeout_s: float = 0.0


class Answer(Struct, kw_only=True):
    """The base of what answers a call, under the `call_id` of that call."""

    call_id: str


def is_expired(call: Call, now_s: float) -> bool:
    """Whether the caller of `call` has stopped waiting for the answer."""
    return call.expires_at_s is not None and now_s >= call.expires_at_s


def is_timeout(timeout_s: float, *, max_s: float) -> bool:
    """Whether a call may wait this long: 0 to `max_s` seconds. NaN may not."""
    return 0 <= timeout_s <= max_s
