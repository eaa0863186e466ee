"""Keys: whatever changes a page must change its name, and a chain may be computed piece by piece."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_keys import make_fingerprint

from headwater.storage.file.bucket_record import decode_bucket, encode_bucket
from headwater.storage.page_key import (
    Bucket,
    Fingerprint,
    chain_hashes,
    config_hash,
    namespace_id,
    page_keys,
    scope_id,
    scope_ids,
)

SEED = b"s" * 16
token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=60)
names = st.text(max_size=8)


def as_tokens(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@settings(deadline=None)  # a busy machine is no failure
@given(token_lists, st.integers(1, 9), st.integers(0, 60))
def test_a_chain_continued_is_the_chain_of_the_whole(values, page_size, cut):
    """Guards chains that restart after a late attach: an unrelated prompt would match."""
    whole = chain_hashes(SEED, as_tokens(values), page_size)
    cut = min(cut // page_size, len(whole))
    head = chain_hashes(SEED, as_tokens(values[: cut * page_size]), page_size)
    tail = chain_hashes(head[-1] if head else SEED, as_tokens(values[cut * page_size :]), page_size)
    assert head + tail == whole
    assert len(whole) == len(values) // page_size


@settings(deadline=None)
@given(token_lists, token_lists, st.integers(1, 5))
def test_hashes_are_equal_exactly_as_far_as_the_tokens(one, two, page_size):
    hashes = [chain_hashes(SEED, as_tokens(values), page_size) for values in (one, two)]
    num_common = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    num_common = min(len(one), len(two)) if num_common is None else num_common
    num_pages = num_common // page_size
    assert hashes[0][:num_pages] == hashes[1][:num_pages]
    assert not set(hashes[0][num_pages:]) & set(hashes[1][num_pages:])


def test_equal_pages_at_different_places_differ():
    hashes = chain_hashes(SEED, as_tokens([5] * 64), 16)
    assert len(set(hashes)) == 4


def test_tokens_of_any_layout_hash_alike():
    """A strided or 64-bit array must not hash to other bytes than its int32 copy."""
    tokens = np.arange(64, dtype=np.int64)[::2]
    assert chain_hashes(SEED, tokens, 4) == chain_hashes(SEED, tokens.astype(np.int32), 4)


def test_known_value():
    """Guards against a change of the hash that would silently empty every store; then raise LAYOUT_VERSION."""
    assert chain_hashes(SEED, as_tokens(list(range(8))), 8)[0].hex() == "41566877d0d75443a67016ef5c02d1cc"


@settings(deadline=None)
@given(st.tuples(names, names, names), st.tuples(names, names, names))
def test_namespaces_are_equal_only_if_all_parts_are(one, two):
    """Guards joins without lengths: salt "ab" + key "c" must not be salt "a" + key "bc"."""
    fingerprint = make_fingerprint()
    ids = [
        namespace_id(fingerprint, cache_salt=salt, extra_key=key, adapter=adapter)
        for salt, key, adapter in (one, two)
    ]
    assert (ids[0] == ids[1]) == (one == two)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Fingerprint)])
def test_every_field_of_the_fingerprint_counts(name):
    fingerprint = make_fingerprint()
    value = getattr(fingerprint, name)
    changed = dataclasses.replace(fingerprint, **{name: value + "x" if isinstance(value, str) else value + 1})
    assert changed.digest() != fingerprint.digest()


def test_config_hash_ignores_the_order_of_keys_only():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1, "b": [1, 2]}) != config_hash({"a": 1, "b": [2, 1]})


optional_names = st.one_of(st.none(), st.sampled_from(["", "*", "=", "a", "=a"]))


@settings(deadline=None)
@given(st.tuples(optional_names, optional_names), st.tuples(optional_names, optional_names))
def test_scopes_are_equal_only_if_their_parts_are(one, two):
    """Guards "all" against a salt that is spelled like it, and None against the empty salt."""
    ids = [scope_id(b"d", cache_salt=salt, extra_key=key) for salt, key in (one, two)]
    assert (ids[0] == ids[1]) == (one == two)


def test_a_namespace_lies_in_the_scopes_that_a_flush_can_name():
    found = scope_ids(b"d", cache_salt="s", extra_key="k")
    assert found == (
        scope_id(b"d"),
        scope_id(b"d", cache_salt="s"),
        scope_id(b"d", extra_key="k"),
        scope_id(b"d", cache_salt="s", extra_key="k"),
    )
    assert len(set(found)) == 4


def make_bucket(generations=(1, 2)) -> Bucket:
    return Bucket.of(SEED, scope_ids=(b"a" * 16, b"b" * 16), generations=generations)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=2))
def test_buckets_differ_when_a_generation_does(generations):
    assert (make_bucket(generations) == make_bucket()) == (generations == [1, 2])
    assert (make_bucket(generations).id == make_bucket().id) == (generations == [1, 2])


def test_keys_count_their_depth_on():
    keys = page_keys(make_bucket(), [b"x" * 16, b"y" * 16], first_depth=7)
    assert [key.depth for key in keys] == [7, 8]


def test_a_bucket_record_round_trips_and_shows_every_damage():
    bucket = make_bucket((5, 2**62))
    record = encode_bucket(bucket)
    found = decode_bucket(bucket.id, record)
    assert found == bucket
    assert (found.scope_ids, found.generations) == (bucket.scope_ids, bucket.generations)
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_bucket(bucket.id, bytes(damaged)) is None
    assert decode_bucket(bucket.id, b"") is None
