"""`GET /cache/tree`: the prefix tree of each engine, with all of its blocks where they are asked for."""

from headwater.generation.answer_fields import Json
from headwater.http_api.engine_answers import facts_of
from headwater.kv_events import MEDIUMS
from headwater.messages.base import unpack_ids
from headwater.messages.cache import CacheTree, TreeBlocks

HASH_BYTES = 16


def tree_facts(tree: CacheTree) -> Json:
    """An engine's picture, without blocks."""
    return facts_of(tree, without=("call_id", "block_size", "blocks", "epoch", "next_event"))


def tree_facts_with_blocks(tree: CacheTree) -> Json:
    """The picture, its blocks, and the number of the first batch of events that is not in them."""
    facts = {"epoch": tree.epoch or None, "next_event": tree.next_event, "block_size": tree.block_size}
    return tree_facts(tree) | facts | {"blocks": [_blocks(node, tree) for node in tree.blocks]}


def _blocks(node: TreeBlocks, tree: CacheTree) -> Json:
    root, hashes = tree.roots[node.root], node.block_hashes
    return {
        "block_hashes": [hashes[at : at + HASH_BYTES].hex() for at in range(0, len(hashes), HASH_BYTES)],
        "parent_block_hash": node.parent.hex() or None,
        "token_ids": unpack_ids(node.token_ids).tolist(),
        "mediums": [MEDIUMS[tier] for tier in node.tiers],
        "cache_salt": root.cache_salt,
        "extra_key": root.extra_key,
        "weights_id": root.weights_id,
        "adapter_id": root.adapter_id,
    }
