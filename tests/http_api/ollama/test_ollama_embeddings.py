"""Ollama's embeddings are those of /v1/embeddings."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_under_test import MODEL, api
from loop_engines import LoopEngine, loop_engines

pytestmark = pytest.mark.anyio
TEXTS = ["abc", "xyz and more"]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


async def test_vectors_are_those_of_openai(engine: LoopEngine) -> None:
    async with api(engine) as server:
        data = (await server.post("/v1/embeddings", {"input": TEXTS})).json()["data"]
        vectors = [item["embedding"] for item in data]
        answer = (
            await server.post("/api/embed", {"model": f"{MODEL}:latest", "input": TEXTS, "truncate": True})
        ).json()
        one = (await server.post("/api/embed", {"model": MODEL, "input": TEXTS[0]})).json()
        older = (await server.post("/api/embeddings", {"model": MODEL, "prompt": TEXTS[0]})).json()
    assert answer["embeddings"] == vectors
    assert answer["prompt_eval_count"] == sum(map(len, TEXTS))
    assert one["embeddings"] == [older["embedding"]] == vectors[:1]


@pytest.mark.parametrize(
    ("more", "status"),
    [({"model": "other"}, 404), ({"input": []}, 400), ({"input": "a" * 500}, 400), ({"dimensions": 3}, 400)],
)
async def test_faults(engine: LoopEngine, more: dict, status: int) -> None:
    async with api(engine) as server:
        response = await server.post("/api/embed", {"model": MODEL, "input": "a"} | more)
    assert response.status_code == status
    assert isinstance(response.json()["error"], str)
