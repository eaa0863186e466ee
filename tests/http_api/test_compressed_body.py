"""gzip bodies are read within the bound that holds for every body; other encodings are named, not misread."""

import gzip
import json
import zlib

import pytest
from api_under_test import api, error_of, saying

from headwater.generation.errors import ApiError
from headwater.generation.model_facts import RequestLimits
from headwater.http_api.compressed_body import MAX_MEMBERS, Inflater
from headwater.messages.generation import Generate
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
BODY = json.dumps({"text": "hello"}).encode()
HEADERS = {"content-type": "application/json", "content-encoding": "gzip"}


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "identity", ""])
async def test_a_compressed_body_is_the_same_request(engine: ScriptedEngine, encoding: str) -> None:
    engine.script.reply = saying("yes")
    content = gzip.compress(BODY) if "gzip" in encoding.lower() else BODY
    async with api(engine) as server:
        headers = HEADERS | {"content-encoding": encoding}
        response = await server.http.post("/generate", content=content, headers=headers)
        assert (response.status_code, response.json()["text"]) == (200, "yes")
    (sent,) = engine.of_type(Generate)
    assert len(sent.prompt_ids) // 4 == len("hello")


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "rot13"])
async def test_other_encodings_are_a_415_that_says_which_are_read(engine: ScriptedEngine, encoding: str) -> None:
    async with api(engine) as server:
        for path in ("/generate", "/flush_cache"):
            response = await server.http.post(path, content=BODY, headers=HEADERS | {"content-encoding": encoding})
            assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_encoding")
            assert response.headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize("path", ["/generate", "/flush_cache", "/v1/chat/completions"])
async def test_a_bomb_is_a_413_before_it_is_unpacked(engine: ScriptedEngine, path: str) -> None:
    bomb = gzip.compress(b" " * (64 << 20))  # 64 KiB of it
    async with api(engine, limits=RequestLimits(max_body_bytes=1 << 20)) as server:
        response = await server.http.post(path, content=bomb, headers=HEADERS)
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "content",
    [b"", BODY, gzip.compress(BODY)[:-1], gzip.compress(BODY) + b"x", zlib.compress(BODY), gzip.compress(BODY[:-1])],
    ids=["empty", "plain", "cut", "followed", "zlib", "half-json"],
)
async def test_what_is_no_gzip_is_a_400(engine: ScriptedEngine, content: bytes) -> None:
    async with api(engine) as server:
        for path in ("/generate", "/flush_cache"):
            response = await server.http.post(path, content=content, headers=HEADERS)
            assert response.status_code == 400
            assert error_of(response)["code"] in ("invalid_encoding", "invalid_json")


def test_a_body_is_inflated_as_it_arrives() -> None:
    whole = gzip.compress(b"one, ") + gzip.compress(b"two")
    inflater = Inflater(max_bytes=100)
    pieces = [inflater.feed(whole[i : i + 1], is_last=i == len(whole) - 1) for i in range(len(whole))]
    assert b"".join(pieces) == b"one, two"


def test_thousands_of_empty_parts_are_refused() -> None:
    with pytest.raises(ApiError, match=f"more than {MAX_MEMBERS} parts"):
        Inflater(max_bytes=100).feed(gzip.compress(b"") * 1000, is_last=True)


def test_exactly_the_bound_passes() -> None:
    assert len(Inflater(max_bytes=1000).feed(gzip.compress(b"a" * 1000), is_last=True)) == 1000
    with pytest.raises(ApiError, match="larger than 999 bytes"):
        Inflater(max_bytes=999).feed(gzip.compress(b"a" * 1000), is_last=True)
