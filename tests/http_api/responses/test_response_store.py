"""Stored responses: bounded in number and bytes, the one unused for longest goes first, and a lost one is a 404."""

import json

import pytest

from headwater.generation.errors import ApiError
from headwater.http_api.response_store import ResponseStore, StoredResponse

HERE = (0, "", "")


def stored(name: str, num_bytes: int = 100, namespace: tuple[int, str, str] = HERE) -> StoredResponse:
    response = json.dumps({"id": name, "output": [{"id": f"{name}_item"}]}).encode()
    conversation = json.dumps([{"role": "user", "content": name}]).encode()
    items = b"[]".ljust(num_bytes - len(response) - len(conversation))
    assert len(items) >= 2
    return StoredResponse(response, items, conversation, (f"{name}_item",), namespace)


def filled(*names: str, max_responses: int = 10, max_bytes: int = 10_000) -> ResponseStore:
    store = ResponseStore(max_responses=max_responses, max_bytes=max_bytes)
    for name in names:
        store.put(name, stored(name))
    return store


def kept(store: ResponseStore, names: str) -> str:
    """Which are kept; asks in a way that is no use."""
    return "".join(name for name in names if store.item(f"{name}_item", HERE) is not None)


def test_what_is_kept_can_be_read() -> None:
    store = filled("a", "b")
    assert json.loads(store.get("a", account=0).response)["id"] == "a"
    assert store.conversation("b", HERE) == [{"role": "user", "content": "b"}]
    assert store.item("a_item", HERE) == {"id": "a_item"}
    assert (len(store), store.num_bytes) == (2, 200)


def test_the_number_is_bounded_and_use_counts() -> None:
    store = filled("a", "b", "c", max_responses=3)
    store.get("a", account=0)
    store.put("d", stored("d"))
    assert kept(store, "abcd") == "acd"
    store.conversation("c", HERE)
    store.put("e", stored("e"))
    assert kept(store, "acde") == "cde"
    assert store.num_dropped == 2


def test_the_bytes_are_bounded() -> None:
    store = filled("a", "b", "c", max_bytes=350)
    store.put("d", stored("d", 200))
    assert kept(store, "abcd") == "cd"
    assert store.num_bytes == 300
    store.put("e", stored("e", 351))
    assert (len(store), store.num_bytes) == (0, 0), "larger than the whole store"


def test_nothing_is_kept_without_room() -> None:
    store = filled("a", max_responses=0)
    with pytest.raises(ApiError, match="up to 0 responses"):
        store.get("a", account=0)


def test_what_is_gone_is_a_404_that_says_why() -> None:
    store = filled("a", "b")
    store.delete("a", account=0)
    calls = (
        lambda: store.get("a", account=0),
        lambda: store.delete("a", account=0),
        lambda: store.conversation("a", HERE),
    )
    for call in calls:
        with pytest.raises(ApiError, match="dropped to make room") as found:
            call()
        assert found.value.status == 404
    assert found.value.code == "previous_response_not_found"
    assert (len(store), store.num_bytes) == (1, 100)
    assert store.item("a_item", HERE) is None


def test_a_conversation_does_not_cross_namespaces() -> None:
    store = filled()
    store.put("a", stored("a", namespace=(0, "tenant", "")))
    with pytest.raises(ApiError):
        store.conversation("a", HERE)
    assert store.item("a_item", HERE) is None
    assert store.conversation("a", (0, "tenant", ""))
    with pytest.raises(ApiError):
        store.conversation("a", (1, "tenant", ""))
    with pytest.raises(ApiError):
        store.get("a", account=1)


def test_clearing_reports_what_it_freed() -> None:
    store = filled("a", "b")
    assert store.clear() == (2, 200)
    assert store.clear() == (0, 0)
    assert kept(store, "ab") == ""
