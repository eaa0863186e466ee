"""The published events of the cache: blocks of tokens that enter or leave a tier, and the reasons.

A block is a page. Its name (16 bytes) is a hash chained over all tokens before it, the model, and the namespace
(storage/page_key.py), so it is the same on every server of a model, and equal names mean equal prompts. Events use
the first 8 bytes as a signed integer, because routers take 64-bit hashes only. On the wire an event is a map with
vLLM's names of 2026, plus fields of our own, which others skip. docs/events.md describes the frames, the sequence
numbers and the replay.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

DEVICE, HOST, FILE_STORE, OTHER_STORE = "GPU", "CPU_PINNED", "DISK", "EXTERNAL"
MEDIUMS = {"device": DEVICE, "host": HOST}  # our tiers; also on a CPU, since routers weigh `GPU` as the nearest


class _Event(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, tag_field="type", kw_only=True):
    """The base: immutable, a map on the wire. Fields without a default are always sent."""

    epoch: str = ""  # names the engine's process; a new process starts empty, with batch 0


class BlockStored(_Event, tag="BlockStored"):
    """Consecutive blocks of one sequence that a tier now holds.

    `token_ids` are the tokens of all blocks, `block_size` for each; `parent_block_hash` is None at the start of a
    sequence. `extra_keys` repeats the salt in vLLM's way: with the first block of a sequence.
    """

    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    full_block_hashes: list[bytes] = []
    cache_salt: str = ""
    extra_key: str = ""
    weights_id: str = ""
    adapter_id: str = ""  # of a LoRA adapter's content; `lora_name` is the name that it had then


class BlockRemoved(_Event, tag="BlockRemoved"):
    """Blocks that a tier no longer serves. `evicted`: for room. `retired`: by a flush or new weights.

    Blocks of a store can also be `missing` or `damaged`, if a read found them so. `cleared` names no blocks: a store
    has lost all blocks with this salt and this key (None: any).
    """

    block_hashes: tuple[int, ...]
    medium: str
    reason: str = ""
    generation: int = 0
    cache_salt: str | None = None
    extra_key: str | None = None


class AllBlocksCleared(_Event, tag="AllBlocksCleared"):
    """A flush, after which this engine knows of no block on any tier. A narrower flush is reported block by block."""

    generation: int = 0
    tiers: tuple[str, ...] = ()


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The events of one turn of the loop: an array of exactly three on the wire."""

    ts: float  # Unix time
    events: tuple[KvEvent, ...]
    data_parallel_rank: int = 0


_encode = msgspec.msgpack.Encoder().encode
decode_batch = msgspec.msgpack.Decoder(EventBatch).decode


def encode_batch(batch: EventBatch) -> bytes:
    """The form of today: events are maps."""
    return _encode(batch)


def encode_batch_as_arrays(batch: EventBatch) -> bytes:
    """vLLM's form before June 2026: events are arrays, with nothing of ours and no trailing nils."""
    return _encode((batch.ts, [_positions(event) for event in batch.events], batch.data_parallel_rank))


def short_hashes(names: Sequence[bytes]) -> tuple[int, ...]:
    """The first 8 bytes of each name (16 bytes), as signed integers."""
    return struct.unpack(f">{2 * len(names)}q", b"".join(names))[::2]


def salt_keys(cache_salt: str, *, num_blocks: int, is_start: bool) -> list[tuple[str, ...] | None] | None:
    """`extra_keys` of blocks with this salt: vLLM hashes it with the first block of a sequence only."""
    if not cache_salt or not is_start:
        return None
    return [(cache_salt,), *[None] * (num_blocks - 1)]


def endpoint_of(endpoint: str, rank: int) -> str:
    """The address of engine `rank`: that of the first engine, with the rank added to its port or path."""
    if rank == 0:
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}.{rank}"
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + rank}"


def stored_in_tree(engine: Mapping[str, Any]) -> tuple[BlockStored, ...]:
    """The cache in an entry of `engines` of `GET /cache/tree?blocks=true`, as the events that would report it.

    A mirror that missed events drops its state, applies these events, and continues with batch `next_event`.
    """
    size = engine["block_size"]
    return tuple(
        _stored_node(node, block_size=size, medium=medium) for node in engine["blocks"] for medium in node["mediums"]
    )


def _stored_node(node: Mapping[str, Any], *, block_size: int, medium: str) -> BlockStored:
    names, parent = [bytes.fromhex(name) for name in node["block_hashes"]], node["parent_block_hash"]
    return BlockStored(
        block_hashes=short_hashes(names),
        parent_block_hash=None if parent is None else short_hashes([bytes.fromhex(parent)])[0],
        token_ids=list(node["token_ids"]),
        block_size=block_size,
        lora_id=None,
        medium=medium,
        lora_name=None,
        extra_keys=salt_keys(node["cache_salt"], num_blocks=len(names), is_start=parent is None),
        full_block_hashes=names,
        cache_salt=node["cache_salt"],
        extra_key=node["extra_key"],
        weights_id=node["weights_id"],
        adapter_id=node.get("adapter_id", ""),
    )


def _positions(event: KvEvent) -> list[Any]:
    match event:
        case BlockStored():
            keys = event.extra_keys
            fields = [event.block_hashes, event.parent_block_hash, event.token_ids, event.block_size]
            more = [event.lora_id, event.medium, *([event.lora_name, keys] if keys or event.lora_name else [])]
            return ["BlockStored", *fields, *more]
        case BlockRemoved():
            return ["BlockRemoved", event.block_hashes, event.medium]
        case AllBlocksCleared():
            return ["AllBlocksCleared"]
