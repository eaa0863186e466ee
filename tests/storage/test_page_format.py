"""The layout of a stored page: every bit counts, and defects are named."""

import pytest
from storage_keys import make_pages

from headwater.storage.page_format import HEADER_BYTES, Defect, find_defect, header_of
from headwater.storage.page_key import Bucket, PageKey

BUCKET = Bucket.of(b"n" * 16, scope_ids=(), generations=())
KEY = PageKey(BUCKET, b"p" * 16, 0)
PAGE = make_pages(1, page_bytes=64)[0]


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_a_whole_page_has_no_defect():
    header = header_of(KEY, PAGE)
    assert len(header) == HEADER_BYTES
    assert find_defect(KEY, header, PAGE) is None
    assert find_defect(KEY, memoryview(bytearray(header)), memoryview(bytearray(PAGE))) is None


def test_every_single_bit_of_header_and_payload_is_covered():
    header = header_of(KEY, PAGE)
    for bit in range(8 * HEADER_BYTES):
        assert find_defect(KEY, flipped(header, bit), PAGE) is not None, bit
    for bit in range(8 * len(PAGE)):
        assert find_defect(KEY, header, flipped(PAGE, bit)) is Defect.CHECKSUM, bit


@pytest.mark.parametrize(
    ("at", "defect"),
    [
        (0, Defect.MAGIC),
        (8, Defect.VERSION),
        (12, Defect.CHECKSUM),
        (16, Defect.LENGTH),
        (32, Defect.KEY),
        (48, Defect.KEY),
        (64, Defect.CHECKSUM),
        (80, Defect.CHECKSUM),
    ],
)
def test_defects_are_named_for_the_metrics(at, defect):
    assert find_defect(KEY, flipped(header_of(KEY, PAGE), 8 * at), PAGE) is defect


def test_truncated_and_swapped_pages_are_found():
    header = header_of(KEY, PAGE)
    assert find_defect(KEY, header[:-1], PAGE) is Defect.TRUNCATED
    assert find_defect(KEY, header, PAGE[:-1]) is Defect.LENGTH
    assert find_defect(KEY._replace(page=b"q" * 16), header, PAGE) is Defect.KEY
    other = Bucket.of(b"m" * 16, scope_ids=(), generations=())
    assert find_defect(KEY._replace(bucket=other), header, PAGE) is Defect.KEY


def test_the_depth_is_no_part_of_the_name():
    """It only orders eviction; a caller that counts differently must still find the page."""
    assert find_defect(KEY._replace(depth=9), header_of(KEY, PAGE), PAGE) is None


def test_an_empty_payload_is_a_page():
    assert find_defect(KEY, header_of(KEY, b""), b"") is None
