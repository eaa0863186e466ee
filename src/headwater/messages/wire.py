"""What crosses the border between an API process and an engine process, as bytes.

The API process sends `ToEngine`, the engine sends `ToClient`. Both are closed unions of tagged msgspec structs in
msgpack: every call and every answer of this package that has a tag, and notices. Nothing here is pickled, nothing
carries a tensor.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Union

import msgspec

from headwater.messages import adapters, cache, control, snapshot, state, two_phase, weights
from headwater.messages.base import Answer, Call, Struct
from headwater.messages.cache import PinGaveWay
from headwater.messages.generation import Generate, GenerateBatch, Outputs

_SUBJECTS = (adapters, cache, control, snapshot, state, two_phase, weights)  # imported, so that their structs exist


def tagged(base: type[Struct]) -> list[type[Struct]]:
    """The structs that can be sent of those that inherit from `base`."""
    found = [base] if base.__struct_config__.tag is not None else []
    for kind in base.__subclasses__():
        found += tagged(kind)
    return found


if TYPE_CHECKING:
    ToEngine = Call | Generate | GenerateBatch
    ToClient = Answer | Outputs | PinGaveWay
else:  # a decoder has to know each struct
    ToEngine = Union[(Generate, GenerateBatch, *tagged(Call))]
    ToClient = Union[(Outputs, PinGaveWay, *tagged(Answer))]

encode = msgspec.msgpack.Encoder().encode

decode_to_engine: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode

decode_to_client: Callable[[bytes], ToClient] = msgspec.msgpack.Decoder(ToClient).decode
