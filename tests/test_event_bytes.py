"""The bytes of the events: what routers parse."""

import msgspec
import pytest

from headwater.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    decode_batch,
    encode_batch,
    encode_batch_as_arrays,
    endpoint_of,
    salt_keys,
    short_hashes,
)

NAMES = [bytes([0xFF] * 8) + b"restrest", bytes(range(16))]
STORED = BlockStored(
    block_hashes=short_hashes(NAMES), parent_block_hash=None, token_ids=[1, 2, 3, 4], block_size=2, lora_id=None,
    medium="GPU", lora_name=None, full_block_hashes=NAMES, weights_id="w0", epoch="e1",
)  # fmt: skip
SALTED = msgspec.structs.replace(STORED, cache_salt="s", extra_keys=salt_keys("s", num_blocks=2, is_start=True))
REMOVED = BlockRemoved(block_hashes=(5,), medium="CPU_PINNED", reason="evicted", epoch="e1")
CLEARED = AllBlocksCleared(generation=3, tiers=("device", "host"), epoch="e1")
BATCH = EventBatch(ts=1.5, events=(STORED, SALTED, REMOVED, CLEARED), data_parallel_rank=0)


def test_a_batch_is_an_array_of_three_even_where_values_are_defaults() -> None:
    """Routers refuse another length."""
    assert msgspec.msgpack.decode(encode_batch(EventBatch(ts=1.0, events=()))) == [1.0, [], 0]
    assert decode_batch(encode_batch(BATCH)) == BATCH


def test_events_are_maps_with_the_fields_that_vllm_requires_and_no_empty_salt() -> None:
    """An empty salt would be a namespace of its own in a router's index."""
    _, (stored, salted, removed, cleared), _ = msgspec.msgpack.decode(encode_batch(BATCH))
    assert stored == {
        "type": "BlockStored", "block_hashes": [-1, 0x0001020304050607], "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None,
        "full_block_hashes": NAMES, "weights_id": "w0", "epoch": "e1",
    }  # fmt: skip
    assert salted == stored | {"cache_salt": "s", "extra_keys": [["s"], None]}
    assert removed == {
        "type": "BlockRemoved", "block_hashes": [5], "medium": "CPU_PINNED", "reason": "evicted", "epoch": "e1"
    }  # fmt: skip
    assert cleared == {"type": "AllBlocksCleared", "generation": 3, "tiers": ["device", "host"], "epoch": "e1"}


def test_arrays_have_vllms_positions_and_nothing_of_ours() -> None:
    """A router that reads by position would take our fields for others: a salt for the name of an adapter."""
    ts, events, rank = msgspec.msgpack.decode(encode_batch_as_arrays(BATCH))
    plain = ["BlockStored", [-1, 0x0001020304050607], None, [1, 2, 3, 4], 2, None, "GPU"]
    assert events == [
        plain,
        [*plain, None, [["s"], None]],
        ["BlockRemoved", [5], "CPU_PINNED"],
        ["AllBlocksCleared"],
    ]
    assert (ts, rank) == (1.5, 0)


def test_only_the_start_of_a_sequence_names_its_salt_in_extra_keys() -> None:
    assert salt_keys("s", num_blocks=3, is_start=False) is None
    assert salt_keys("", num_blocks=3, is_start=True) is None
    assert salt_keys("s", num_blocks=1, is_start=True) == [("s",)]


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://127.0.0.1:5557", 2, "tcp://127.0.0.1:5559"),
        ("ipc:///tmp/events", 1, "ipc:///tmp/events.1"),
        ("ipc:///tmp/events", 0, "ipc:///tmp/events"),
    ],
)
def test_each_engine_has_an_address_of_its_own(endpoint: str, rank: int, expected: str) -> None:
    assert endpoint_of(endpoint, rank) == expected
