"""The record that a store keeps of each bucket, from which any server determines whether it is unreachable."""

import msgspec

from headwater.storage.page_key import Bucket


class _Record(msgspec.Struct, array_like=True, frozen=True):
    namespace: bytes
    scope_ids: tuple[bytes, ...]
    generations: tuple[int, ...]


_decode = msgspec.msgpack.Decoder(_Record).decode


def encode_bucket(bucket: Bucket) -> bytes:
    """The record of a bucket, at most a few hundred bytes."""
    return msgspec.msgpack.encode(_Record(bucket.namespace, bucket.scope_ids, bucket.generations))


def decode_bucket(bucket_id: bytes, record: bytes) -> Bucket | None:
    """The bucket, or None if the record is damaged, which shows since the id is a hash of the record's contents."""
    try:
        found = _decode(record)
    except msgspec.DecodeError:
        return None
    if len(found.scope_ids) != len(found.generations):
        return None
    bucket = Bucket.of(found.namespace, scope_ids=found.scope_ids, generations=found.generations)
    return bucket if bucket.id == bucket_id else None
