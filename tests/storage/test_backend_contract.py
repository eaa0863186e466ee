"""What every storage backend must do. A new one is added in conftest.py and stores_under_test.py."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from storage_keys import Tenant, make_buffers, make_fingerprint, make_pages

from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.errors import StorageClosed

HIT, MISS, CORRUPT, STALE = ReadStatus.HIT, ReadStatus.MISS, ReadStatus.CORRUPT, ReadStatus.STALE
STORED, PRESENT = WriteStatus.STORED, WriteStatus.PRESENT


def read(backend, keys, pages):
    """Statuses of a `get`, after checking that every hit is the right page."""
    buffers = make_buffers(pages)
    statuses = backend.get(keys, buffers)
    for status, buffer, page in zip(statuses, buffers, pages, strict=True):
        assert status is not HIT or buffer == page
    return statuses


def test_what_is_put_comes_back(backend):
    keys, pages = Tenant().keys(backend, 5), make_pages(5)
    assert read(backend, keys, pages) == [MISS] * 5
    assert backend.put(keys, pages) == [STORED] * 5
    assert backend.put(keys, pages) == [PRESENT] * 5
    assert read(backend, keys, pages) == [HIT] * 5


def test_a_batch_may_mix_hits_and_misses_in_any_order(backend):
    """Guards against statuses that are shifted against their keys."""
    keys, pages = Tenant().keys(backend, 8), make_pages(8)
    backend.put(keys[::2], pages[::2])
    assert backend.exists(keys) == [True, False] * 4
    assert read(backend, keys, pages) == [HIT, MISS] * 4
    assert backend.put(keys[::-1], pages[::-1]) == [STORED, PRESENT] * 4


def test_a_batch_may_mix_namespaces(backend):
    one, two = Tenant("a").keys(backend, 3), Tenant("b").keys(backend, 3)
    keys = [one[0], two[0], one[1], two[1], two[2], one[2]]
    pages = make_pages(6)
    backend.put(keys, pages)
    backend.raise_generation(Tenant().scope(cache_salt="b"))
    assert read(backend, keys, pages) == [HIT, STALE, HIT, STALE, STALE, HIT]


def test_empty_batches_are_fine(backend):
    assert backend.get([], []) == []
    assert backend.put([], []) == []
    assert backend.exists([]) == []
    assert backend.delete([]) == 0
    assert backend.generations([]) == ()


def test_pages_of_real_size_in_a_long_batch(backend):
    """More than one portion of a pipeline, and buffers larger than any socket's."""
    keys, pages = Tenant().keys(backend, 30), make_pages(30, page_bytes=368_640)
    assert backend.put(keys, pages) == [STORED] * 30
    assert read(backend, keys, pages) == [HIT] * 30


def test_the_store_keeps_its_own_copy(backend):
    """The caller's buffers are host pages that are used again at once."""
    page = bytearray(make_pages(1)[0])
    before = bytes(page)
    keys = Tenant().keys(backend, 1)
    backend.put(keys, [memoryview(page)])
    page[:] = bytes(len(page))
    assert read(backend, keys, [memoryview(before)]) == [HIT]


def test_deleted_pages_are_gone_and_counted_once(backend):
    keys, pages = Tenant().keys(backend, 4), make_pages(4)
    backend.put(keys, pages)
    assert backend.delete(keys[:2]) == 2
    assert backend.delete(keys[:3]) == 1
    assert read(backend, keys, pages) == [MISS, MISS, MISS, HIT]


@pytest.mark.parametrize(
    "stranger",
    [
        Tenant(cache_salt="other"),
        Tenant(extra_key="other"),
        Tenant(fingerprint=make_fingerprint(weights_id="weights-2")),
        Tenant(fingerprint=make_fingerprint(model_config_hash="config-2")),
        Tenant(fingerprint=make_fingerprint(kv_dtype="bfloat16")),
        Tenant(fingerprint=make_fingerprint(num_kv_heads=1, tensor_parallel_size=2)),
        Tenant(fingerprint=make_fingerprint(tensor_parallel_rank=1)),
        Tenant(fingerprint=make_fingerprint(layout_version=99)),
    ],
    ids=["salt", "extra key", "weights", "config", "dtype", "ranks", "rank", "layout"],
)
def test_who_differs_finds_nothing(backend, stranger):
    """Guards the isolation of tenants, weights and layouts that share a store."""
    pages = make_pages(3)
    backend.put(Tenant().keys(backend, 3), pages)
    assert read(backend, stranger.keys(backend, 3), pages) == [MISS] * 3


def test_a_second_server_finds_what_the_first_stored(store, backend):
    pages = make_pages(3)
    backend.put(Tenant().keys(backend, 3), pages)
    other = store.open()
    assert read(other, Tenant().keys(other, 3), pages) == [HIT] * 3


@pytest.mark.parametrize(
    "scope",
    [{}, {"cache_salt": "s"}, {"extra_key": "k"}, {"cache_salt": "s", "extra_key": "k"}],
    ids=["all", "salt", "key", "both"],
)
def test_a_raised_counter_hides_its_scope_at_once_and_nothing_else(store, backend, scope):
    tenant, pages = Tenant("s", "k"), make_pages(2)
    neighbours = [Tenant("s2", "k2"), Tenant("s2", "k"), Tenant("s", "k2"), Tenant()]
    for owner in [tenant, *neighbours]:
        backend.put(owner.keys(backend, 2), pages)
    old_keys = tenant.keys(backend, 2)
    other = store.open()
    before = other.generations([tenant.scope(**scope)])[0]
    assert other.raise_generation(tenant.scope(**scope)) == before + 1
    # the caller still holds keys of before: neither it nor anybody else may use them
    assert read(backend, old_keys, pages) == [STALE] * 2
    assert backend.put(old_keys, pages) == [WriteStatus.STALE] * 2
    assert backend.exists(old_keys) == [False] * 2
    assert read(backend, tenant.keys(backend, 2), pages) == [MISS] * 2
    for neighbour in neighbours:
        is_hidden = all(getattr(neighbour, name) == value for name, value in scope.items())
        expected = MISS if is_hidden else HIT
        assert read(backend, neighbour.keys(backend, 2), pages) == [expected] * 2


def test_a_flush_does_not_harm_other_models(backend):
    neighbour = Tenant(fingerprint=make_fingerprint(model_config_hash="config-2"))
    pages = make_pages(2)
    backend.put(neighbour.keys(backend, 2), pages)
    backend.raise_generation(Tenant().scope())
    assert read(backend, neighbour.keys(backend, 2), pages) == [HIT] * 2


def test_a_flush_covers_earlier_weights_of_the_same_model(backend):
    """Guards against old pages that come back when a trainer loads an earlier checkpoint again."""
    before, now = Tenant(), Tenant(fingerprint=make_fingerprint(weights_id="weights-2"))
    pages = make_pages(2)
    backend.put(before.keys(backend, 2), pages)
    backend.raise_generation(now.scope())
    assert read(backend, before.keys(backend, 2), pages) == [MISS] * 2


def test_concurrent_raises_all_count(store, backend):
    """Guards against a counter that loses an update: two flushes, one of which did nothing."""
    scope = Tenant().scope()
    start = backend.generations([scope])[0]
    backends = [store.open() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        raised = list(pool.map(lambda n: backends[n % 4].raise_generation(scope), range(24)))
    assert sorted(raised) == [start + n for n in range(1, 25)]
    assert {b.generations([scope])[0] for b in backends} == {start + 24}


def test_reaping_deletes_what_is_unreachable_and_only_that(store, backend):
    flushed, kept = Tenant("s"), Tenant("t")
    model_two = Tenant("s", fingerprint=make_fingerprint(model_config_hash="config-2"))
    pages = make_pages(6)
    for owner in (flushed, kept, model_two):
        backend.put(owner.keys(backend, 6), pages)
    assert backend.reap(max_pages=100) == 0
    backend.raise_generation(flushed.scope(cache_salt="s"))
    other = store.open()  # the reaper of a server that never saw these pages
    assert other.reap(max_pages=4) == 4
    assert other.reap(max_pages=4) == 2
    assert other.reap(max_pages=4) == 0
    assert other.usage().num_pages == 12
    for owner in (kept, model_two):
        assert read(other, owner.keys(other, 6), pages) == [HIT] * 6


def test_abandoned_buckets_are_reaped_others_are_not(backend):
    """Weights with a random id that are gone for good leave pages that no counter tells of."""
    mine, other = Tenant(), Tenant(fingerprint=make_fingerprint(weights_id="weights-2"))
    pages = make_pages(3)
    for owner in (mine, other):
        backend.put(owner.keys(backend, 3), pages)
    abandoned = {mine.bucket(backend).id}
    assert backend.reap(max_pages=10, abandoned=abandoned) == 3
    assert backend.reap(max_pages=10, abandoned=abandoned) == 0
    assert read(backend, mine.keys(backend, 3), pages) == [MISS] * 3
    assert read(backend, other.keys(backend, 3), pages) == [HIT] * 3


def test_usage_follows_puts_and_deletes(backend):
    keys, pages = Tenant().keys(backend, 4), make_pages(4, page_bytes=4000)
    assert (backend.usage().num_pages, backend.usage().num_bytes) == (0, 0)
    backend.put(keys, pages)
    assert backend.usage().num_pages == 4
    assert 16_000 <= backend.usage().num_bytes <= 4 * 8192
    backend.delete(keys)
    assert (backend.usage().num_pages, backend.usage().num_bytes) == (0, 0)


def test_counters_tell_what_happened(backend):
    keys, pages = Tenant().keys(backend, 3), make_pages(3)
    backend.put(keys[:2], pages[:2])
    read(backend, keys, pages)
    counters = backend.counters()
    assert counters["write_stored"] == 2
    assert counters["written_bytes"] == 2000
    assert (counters["read_hit"], counters["read_miss"]) == (2, 1)
    assert counters["read_bytes"] == 2000


# bit positions by field of the header (page_format.py), and into the payload
REGIONS = {
    "magic": 0,
    "version": 8 * 8,
    "reserved 1": 12 * 8,
    "length": 16 * 8,
    "length, high byte": 23 * 8,
    "reserved 2": 24 * 8,
    "bucket": 32 * 8,
    "page hash": 48 * 8,
    "reserved 3": 70 * 8,
    "checksum": 80 * 8,
    "payload, first": 96 * 8,
    "payload, middle": (96 + 500) * 8 + 3,
    "payload, last": (96 + 1000) * 8 - 1,
}


@pytest.mark.parametrize("bit", REGIONS.values(), ids=REGIONS.keys())
def test_one_flipped_bit_is_never_a_hit(store, backend, bit):
    keys, pages = Tenant().keys(backend, 3), make_pages(3)
    backend.put(keys, pages)
    content = bytearray(store.stored_bytes(keys[1]))
    content[bit // 8] ^= 1 << bit % 8
    store.overwrite(keys[1], bytes(content))
    assert read(backend, keys, pages) == [HIT, CORRUPT, HIT]
    assert sum(n for name, n in backend.counters().items() if name.startswith("defect_")) == 1
    assert backend.counters()["read_bytes"] == 2000, "of the two hits"
    assert read(backend, keys, pages) == [HIT, MISS, HIT], "a damaged page must be deleted"
    assert backend.put(keys, pages) == [PRESENT, STORED, PRESENT], "and can be stored again"


@pytest.mark.parametrize("size", [0, 1, 95, 96, 500, 1095, 1097, 3000])
def test_a_page_of_the_wrong_length_is_never_a_hit(store, backend, size):
    keys, pages = Tenant().keys(backend, 1), make_pages(1)
    backend.put(keys, pages)
    content = store.stored_bytes(keys[0])
    store.overwrite(keys[0], (content * 3)[:size])
    assert read(backend, keys, pages) == [CORRUPT]


def test_a_whole_page_under_another_pages_name_is_never_a_hit(store, backend):
    """Its checksum is right: the key in the header must be compared, too."""
    keys, pages = Tenant().keys(backend, 2), make_pages(2)
    backend.put(keys, pages)
    store.overwrite(keys[0], store.stored_bytes(keys[1]))
    assert read(backend, keys, pages) == [CORRUPT, HIT]


def test_random_damage_is_never_a_hit(store, backend):
    rng = random.Random(7)
    keys, pages = Tenant().keys(backend, 60), make_pages(60)
    backend.put(keys, pages)
    for key in keys:
        content = bytearray(store.stored_bytes(key))
        for _ in range(rng.randint(1, 9)):
            at = rng.randrange(len(content))
            content[at] = (content[at] + rng.randint(1, 255)) % 256
        store.overwrite(key, bytes(content))
    assert HIT not in read(backend, keys, pages)


def test_a_buffer_of_another_size_is_never_filled(backend):
    keys, pages = Tenant().keys(backend, 1), make_pages(1)
    backend.put(keys, pages)
    assert backend.get(keys, [memoryview(bytearray(999))]) == [CORRUPT]


def test_threads_may_share_a_backend(backend):
    """Readers, writers and a deleter on the same pages: a hit is always the whole right page."""
    keys, pages = Tenant().keys(backend, 20), make_pages(20, page_bytes=20_000)
    errors: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            chosen = sorted(rng.sample(range(20), 5))
            some_keys, some_pages = [keys[n] for n in chosen], [pages[n] for n in chosen]
            match seed % 3:
                case 0:
                    backend.put(some_keys, some_pages)
                case 1:
                    backend.delete(some_keys[:2])
                case _:
                    statuses = read(backend, some_keys, some_pages)
                    errors.extend(status for status in statuses if status not in (HIT, MISS))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    backend.put(keys, pages)
    assert read(backend, keys, pages) == [HIT] * 20


def test_what_may_happen_is_counted_before_it_does(store):
    """Prometheus sees no increase to the first value of a series, so the first damaged page would go unnoticed."""
    counters = store.open().counters()
    wanted = [f"read_{status}" for status in ReadStatus] + [f"write_{status}" for status in WriteStatus]
    assert {name: counters.get(name) for name in wanted} == dict.fromkeys(wanted, 0)


def test_a_closed_backend_says_so(store):
    backend = store.open()
    keys, pages = Tenant().keys(backend, 1), make_pages(1)
    backend.close()
    backend.close()  # harmless
    for call in (
        lambda: backend.get(keys, make_buffers(pages)),
        lambda: backend.put(keys, pages),
        lambda: backend.exists(keys),
        lambda: backend.generations([Tenant().scope()]),
        lambda: backend.raise_generation(Tenant().scope()),
        lambda: backend.reap(max_pages=1),
        backend.usage,
    ):
        with pytest.raises(StorageClosed):
            call()
