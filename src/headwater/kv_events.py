"""The published events of the cache: blocks of tokens that enter or leave a tier, and the reasons.

A block is a page. Its hash is chained over all tokens before it, the model, and the namespace
(storage/page_key.py), so it is the same on every server of a model, and equal hashes mean equal prompts.
Structs are arrays on the wire, with the class's name first; fields may be added at the end. docs/events.md
describes the frames, the sequence numbers and the replay.
"""

from collections.abc import Mapping
from typing import Any

import msgspec


class _Event(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """The base: immutable, positional on the wire, trailing defaults left out."""


class BlockStored(_Event, tag="BlockStored"):
    """Consecutive blocks of one sequence that a tier now holds.

    `token_ids` are the tokens of all blocks, `block_size` for each; `parent_block_hash` is None at the start of a
    sequence.
    """

    block_hashes: tuple[bytes, ...]
    parent_block_hash: bytes | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None = None
    medium: str = "device"  # device, host or storage
    cache_salt: str = ""
    session_id: str | None = None
    lora_name: str | None = None
    extra_key: str = ""
    weights_id: str = ""


class BlockRemoved(_Event, tag="BlockRemoved"):
    """Blocks that a tier no longer serves. `evicted`: for room. `retired`: by a flush or new weights.

    Blocks of a store can also be `missing` or `damaged`, if a read found them so.
    """

    block_hashes: tuple[bytes, ...]
    medium: str = "device"
    reason: str = "evicted"


class AllBlocksCleared(_Event, tag="AllBlocksCleared"):
    """A flush of everything on `tiers`. A narrower flush is reported block by block, except for a store.

    For a store, `cache_salt` and `extra_key` name the namespaces that the flush covers; None means all.
    """

    generation: int = 0
    tiers: tuple[str, ...] = ()
    cache_salt: str | None = None
    extra_key: str | None = None


def stored_in_tree(engine: Mapping[str, Any]) -> tuple[BlockStored, ...]:
    """The cache in an entry of `engines` of `GET /cache/tree?blocks=true`, as the events that would report it.

    A mirror that missed events drops its state, applies these events, and continues with batch `next_event`.
    """
    size = engine["block_size"]
    return tuple(
        BlockStored(
            block_hashes=tuple(bytes.fromhex(block) for block in node["block_hashes"]),
            parent_block_hash=None if node["parent_block_hash"] is None else bytes.fromhex(node["parent_block_hash"]),
            token_ids=tuple(node["token_ids"]),
            block_size=size,
            medium=medium,
            cache_salt=node["cache_salt"],
            extra_key=node["extra_key"],
            weights_id=node["weights_id"],
        )
        for node in engine["blocks"]
        for medium in node["mediums"]
    )


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(_Event):
    """The events of one turn of the loop. `epoch` names the engine's process; a new process starts empty, at 0."""

    ts: float  # Unix time
    events: tuple[KvEvent, ...]
    data_parallel_rank: int = 0
    epoch: str = ""


encode_batch = msgspec.msgpack.Encoder().encode
decode_batch = msgspec.msgpack.Decoder(EventBatch).decode
