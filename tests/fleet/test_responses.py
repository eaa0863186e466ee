"""Which replica keeps a response: found in whatever chunks its answer comes, and forgotten in order."""

import json

import pytest

from headwater.fleet.responses import IdReader, ResponseOwners, asked_for


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_id_is_found_once_in_an_answer_and_in_a_stream(size: int) -> None:
    whole = b'{"previous_response_id": "resp_99", "id": "resp_a1", "output": [{"id": "msg_1"}, {"id": "resp_b2"}]}'
    event = b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_a1"}}\n\n'
    for text in (whole, event):
        reader = IdReader()
        found = [reader.read(text[at : at + size]) for at in range(0, len(text), size)]
        assert [id for id in found if id is not None] == ["resp_a1"]


def test_the_oldest_are_forgotten() -> None:
    owners = ResponseOwners(max_known=2)
    for number in range(3):
        owners.learn(f"resp_{number}", number)
    assert [owners.of(f"resp_{number}") for number in range(3)] == [None, 1, 2]


def test_what_a_request_is_about() -> None:
    body = json.dumps({"previous_response_id": "resp_1"}).encode()
    assert asked_for("POST", "/v1/responses", body) == ("resp_1", "previous_response_id")
    assert asked_for("GET", "/v1/responses/resp_1/input_items", b"") == ("resp_1", "response_id")
    for method, path, content in (
        ("POST", "/v1/responses", b"not json"),
        ("POST", "/v1/responses", b"[]"),
        ("POST", "/v1/responses/input_tokens", body),
        ("POST", "/v1/completions", body),
    ):
        assert asked_for(method, path, content) is None
