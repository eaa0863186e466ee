"""Embeddings and scores over HTTP, from a real loop whose hidden states are made of canaries."""

import asyncio
import base64
import math
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from api_under_test import TOKENIZER, api, error_of, until
from loop_engines import LoopEngine, loop_engines

from headwater.http_api.openapi.pooling_answers import EmbeddingList, Encoded, Scores

pytestmark = pytest.mark.anyio
PROMPTS = [list(range(100, 122)), [5, 6, 7], list(range(30, 80))]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path, num_pages=64, max_context=200, prefill_chunk_tokens=7) as (engine,):
        yield engine


def serve_with(server, **facts) -> None:
    """Change what the server knows about its model."""
    server.state.model = replace(server.state.model, **facts)


async def test_every_text_has_a_vector_of_length_1_in_the_order_of_the_input(engine) -> None:
    async with api(engine) as server:
        answer = (await server.post("/v1/embeddings", {"input": PROMPTS})).json()
        msgspec.convert(answer, EmbeddingList)
        assert [item["index"] for item in answer["data"]] == [0, 1, 2]
        vectors = [item["embedding"] for item in answer["data"]]
        for prompt, vector in zip(PROMPTS, vectors, strict=True):
            assert abs(math.hypot(*vector) - 1) < 1e-6
            alone = (await server.post("/v1/embeddings", {"input": prompt})).json()
            assert alone["data"][0]["embedding"] == vector
        assert len({tuple(vector) for vector in vectors}) == 3
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 75


async def test_base64_holds_the_same_float32_numbers(engine) -> None:
    async with api(engine) as server:
        body = {"input": "a text", "model": server.state.model.served_name}
        plain = (await server.post("/v1/embeddings", body)).json()["data"][0]["embedding"]
        encoded = (await server.post("/v1/embeddings", body | {"encoding_format": "base64"})).json()
        assert array("f", base64.b64decode(encoded["data"][0]["embedding"])).tolist() == plain


async def test_mean_and_last_differ_and_the_mean_is_the_same_behind_a_cached_prefix(engine) -> None:
    async with api(engine) as server:
        last = (await server.post("/v1/embeddings", {"input": PROMPTS[0]})).json()["data"][0]["embedding"]
        serve_with(server, pooling="mean")
        mean = (await server.post("/v1/embeddings", {"input": PROMPTS[0]})).json()["data"][0]["embedding"]
        assert mean != last
        await server.post("/generate", {"input_ids": PROMPTS[0]})
        again = (await server.post("/v1/embeddings", {"input": PROMPTS[0]})).json()
        assert again["data"][0]["embedding"] == mean
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_an_embedding_leaves_no_kv_unless_it_is_asked_to(engine) -> None:
    async with api(engine) as server:
        for no_store, num_cached in ((None, 0), (False, 20)):
            await server.post("/v1/embeddings", {"input": PROMPTS[0], "no_store": no_store})
            answer = (await server.post("/v1/embeddings", {"input": PROMPTS[0]})).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == num_cached


async def test_dimensions_are_refused_unless_the_model_is_a_matryoshka(engine) -> None:
    async with api(engine) as server:
        serve_with(server, hidden_size=31)
        body = {"input": PROMPTS[2]}
        serve_with(server, pooling="mean")
        whole = (await server.post("/v1/embeddings", body | {"dimensions": 31})).json()["data"][0]["embedding"]
        refused = await server.post("/v1/embeddings", body | {"dimensions": 8})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "dimensions")
        serve_with(server, embedding_dimensions=(8, 16))
        cut = (await server.post("/v1/embeddings", body | {"dimensions": 8})).json()["data"][0]["embedding"]
        length = math.hypot(*whole[:8])
        assert cut == pytest.approx([number / length for number in whole[:8]], abs=1e-6)
        assert (await server.post("/v1/embeddings", body | {"dimensions": 9})).status_code == 400


async def test_encode_is_the_same_in_sglangs_form(engine) -> None:
    async with api(engine) as server:
        right = (await server.post("/v1/embeddings", {"input": ["ab", "cd"]})).json()["data"]
        one = (await server.post("/encode", {"text": "ab"})).json()
        many = (await server.post("/encode", {"text": ["ab", "cd"]})).json()
        ids = (await server.post("/encode", {"input_ids": TOKENIZER.encode("cd")})).json()
        msgspec.convert([one, *many], list[Encoded])
        assert one["embedding"] == right[0]["embedding"]
        assert [it["embedding"] for it in many] == [it["embedding"] for it in right]
        assert ids["embedding"] == right[1]["embedding"]
        assert one["meta_info"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": [[99999]]}, "input"),
        ("/v1/embeddings", {"input": "a" * 300}, "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "stream": True}, "stream"),
        ("/v1/embeddings", {"input": "a", "normalize": False}, "normalize"),
        ("/v1/embeddings", {"input": "a", "input_type": "query"}, "input_type"),
        ("/v1/embeddings", {"text": "a"}, "text"),
        ("/encode", {}, "text"),
        ("/v1/score", {"query": "a", "items": [[1]], "label_token_ids": [1]}, "items"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": []}, "label_token_ids"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [99999]}, "label_token_ids"),
        ("/v1/score", {"query": "a", "items": [], "label_token_ids": [1]}, "items"),
        ("/v1/score", {"query": [1], "items": [], "label_token_ids": [1]}, "items"),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "model"),
    ],
)
async def test_bad_bodies_are_a_400_that_names_the_parameter(engine, path, body, param) -> None:
    async with api(engine) as server:
        response = await server.post(path, body)
        assert (response.status_code, error_of(response)["param"]) == (400, param), response.text


async def test_another_model_is_a_404_and_an_unknown_pooling_a_400(engine) -> None:
    async with api(engine) as server:
        assert (await server.post("/v1/embeddings", {"input": "a", "model": "other"})).status_code == 404
        serve_with(server, pooling="pooling_mode_cls_token")
        refused = await server.post("/v1/embeddings", {"input": "a"})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "model")
        assert "pooling_mode_cls_token" in error_of(refused)["message"]


async def test_an_aborted_embedding_is_an_error(engine) -> None:
    async with api(engine) as server:
        await server.post("/pause_generation", {"mode": "retract"})
        running = asyncio.ensure_future(server.post("/v1/embeddings", {"input": PROMPTS, "rid": "e"}))
        await until(lambda: server.state.client.num_running == 3)
        await server.post("/abort_request", {"rid": "e_1"})
        await server.post("/continue_generation", {})
        assert (await running).status_code == 499


async def test_scores_are_probabilities_of_the_labels(engine) -> None:
    """Every log-probability of this engine is -1."""
    async with api(engine) as server:
        body = {"query": "is it? ", "items": ["yes", "no", "perhaps"], "label_token_ids": [4, 5]}
        answer = (await server.post("/v1/score", body)).json()
        msgspec.convert(answer, Scores)
        assert answer["scores"] == [[math.exp(-1)] * 2] * 3
        assert answer["usage"]["prompt_tokens"] == sum(len(f"is it? {item}") for item in body["items"])
        answer = (await server.post("/v1/score", body | {"apply_softmax": True, "items": "yes"})).json()
        assert answer["scores"] == [[0.5, 0.5]]


async def test_the_item_comes_first_if_it_is_asked_to(engine) -> None:
    async with api(engine) as server:
        body = {"query": PROMPTS[0], "items": [[1, 2], [3]], "label_token_ids": [4]}
        await server.post("/v1/score", body)
        response = await server.post("/generate", {"input_ids": [*PROMPTS[0], 1, 2]})
        assert response.json()["meta_info"]["cached_tokens"] == 20, "five pages of the same tokens"
        await server.post("/v1/score", body | {"item_first": True})
        response = await server.post("/generate", {"input_ids": [1, 2, *PROMPTS[0]]})
        assert response.json()["meta_info"]["cached_tokens"] == 20
