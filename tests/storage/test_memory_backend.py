"""The memory store alone: its bound, and what it drops first."""

import pytest
from storage_keys import Tenant, make_buffers, make_pages

from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.memory import MemoryBackend
from headwater.storage.page_format import HEADER_BYTES

PAGE_BYTES = 1000


def make_store(num_pages: int) -> MemoryBackend:
    return MemoryBackend(capacity_bytes=num_pages * (HEADER_BYTES + PAGE_BYTES))


def test_the_store_never_grows_over_its_capacity():
    backend = make_store(7)
    for text in range(10):
        backend.put(Tenant().keys(backend, 5, text=text), make_pages(5))
        assert backend.usage().num_bytes <= backend.usage().capacity_bytes
    assert backend.usage().num_pages == 7
    assert backend.counters()["evicted_pages"] == 43


@pytest.mark.parametrize("use", ["get", "put"])
def test_what_was_used_lately_stays(use):
    backend, pages = make_store(6), make_pages(2)
    texts = [Tenant().keys(backend, 2, text=text) for text in range(4)]
    for keys in texts[:3]:
        backend.put(keys, pages)
    if use == "get":
        assert backend.get(texts[0], make_buffers(pages)) == [ReadStatus.HIT] * 2
    else:
        assert backend.put(texts[0], pages) == [WriteStatus.PRESENT] * 2
    backend.put(texts[3], pages)
    assert [backend.exists(keys) for keys in texts] == [[True] * 2, [False] * 2, [True] * 2, [True] * 2]


def test_a_sequence_loses_its_tail_first():
    backend, pages = make_store(10), make_pages(10)
    keys = Tenant().keys(backend, 10)
    backend.put(keys, pages)
    backend.put(Tenant("other").keys(backend, 4), pages[:4])
    assert backend.exists(keys) == [True] * 6 + [False] * 4


def test_a_page_larger_than_the_store_is_refused():
    backend = make_store(1)
    keys = Tenant().keys(backend, 2)
    assert backend.put(keys[:1], make_pages(1)) == [WriteStatus.STORED]
    assert backend.put(keys[1:], make_pages(1, page_bytes=PAGE_BYTES + 1)) == [WriteStatus.FULL]
    assert backend.exists(keys) == [True, False]


def test_a_capacity_below_one_is_refused():
    with pytest.raises(ValueError, match="capacity_bytes must be at least 1, found 0"):
        MemoryBackend(capacity_bytes=0)
