"""The bytes of a stored page: a header of 96 bytes, then the payload as it is in memory.

    offset  bytes  field (integers little-endian)
    0       8      magic "HWKVPAGE"
    8       4      version, 1
    12      4      reserved, 0
    16      8      payload length
    24      8      reserved, 0
    32      16     bucket id
    48      16     page hash
    64      16     reserved, 0
    80      16     XXH3-128 of bytes 0..79 and the payload
    96             payload

The checksum finds damage, not forgery: a process that can write to the store can write wrong pages.
"""

import struct
from enum import StrEnum

import xxhash

from headwater.storage.page_key import PageKey

HEADER_BYTES = 96
VERSION = 1
_MAGIC = b"HWKVPAGE"
_FIELDS = struct.Struct("<8sIIQQ16s16s16x")
_CHECKSUM_AT = _FIELDS.size
assert _CHECKSUM_AT + 16 == HEADER_BYTES

Buffer = bytes | bytearray | memoryview


class Defect(StrEnum):
    """The reason why a stored page is not the requested one."""

    TRUNCATED = "truncated"
    MAGIC = "magic"
    VERSION = "version"
    LENGTH = "length"
    KEY = "key"
    CHECKSUM = "checksum"


def header_of(key: PageKey, payload: Buffer) -> bytes:
    """The header to store before `payload`, which is bytes-like, one-dimensional and contiguous."""
    fields = _FIELDS.pack(_MAGIC, VERSION, 0, len(payload), 0, key.bucket.id, key.page)
    return fields + _checksum(fields, payload)


def find_defect(key: PageKey, header: Buffer, payload: Buffer) -> Defect | None:
    """The defect of a stored page; None if `header` and `payload` are whole and belong to `key`."""
    if len(header) != HEADER_BYTES:
        return Defect.TRUNCATED
    magic, version, _, payload_bytes, _, bucket, page = _FIELDS.unpack_from(header)
    if magic != _MAGIC:
        return Defect.MAGIC
    if version != VERSION:
        return Defect.VERSION
    if payload_bytes != len(payload):
        return Defect.LENGTH
    if bucket != key.bucket.id or page != key.page:
        return Defect.KEY
    if header[_CHECKSUM_AT:] != _checksum(header[:_CHECKSUM_AT], payload):
        return Defect.CHECKSUM
    return None


def _checksum(fields: Buffer, payload: Buffer) -> bytes:
    state = xxhash.xxh3_128(bytes(fields))
    state.update(payload)
    return state.digest()
