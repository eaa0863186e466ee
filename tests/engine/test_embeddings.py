"""Embeddings of the whole engine with real kernels: those of transformers, under chunks, cache hits and retractions."""

import random
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from test_golden_engine import RealEngine, _prompts  # noqa: E402

from headwater.messages.base import pack_ids  # noqa: E402
from headwater.messages.generation import Generate, RequestOptions, SamplingParams  # noqa: E402
from tiny_models import VOCAB_SIZE, make_tiny_model  # noqa: E402


def embed(engine: RealEngine, rid: str, prompt: list[int], pooling: str, *, no_store: bool) -> None:
    engine.tokens[rid] = []
    engine.send(
        Generate(
            rid=rid,
            prompt_ids=pack_ids(prompt),
            sampling=SamplingParams(max_new_tokens=0),
            options=RequestOptions(no_store=no_store),
            pooling=pooling,
        )
    )


@torch.inference_mode()
def reference(model, prompt: list[int], pooling: str) -> np.ndarray:
    """The last hidden states of transformers, which are behind the last norm."""
    hidden = model.model(torch.tensor([prompt])).last_hidden_state[0].double()
    pooled = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
    return (pooled / pooled.norm()).numpy()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_embeddings_are_those_of_transformers_beside_text(name: str, tmp_path: Path) -> None:
    """A chunk, a cached token or a neighbour's row in the sum would turn the vector."""
    model = make_tiny_model(name, tmp_path)
    prompts = _prompts(12, VOCAB_SIZE)
    engine = RealEngine(tmp_path, num_pages=50)
    source = random.Random(2)
    for lap in range(2):
        for index, prompt in enumerate(prompts):
            for pooling in ("last", "mean"):
                embed(engine, f"{lap}-{index}-{pooling}", prompt, pooling, no_store=index % 2 == 0)
            engine.generate(f"{lap}-{index}", prompt)
            engine.turn(source.randrange(3))
        engine.finish()
    lowest = 1.0
    for index, prompt in enumerate(prompts):
        for pooling in ("last", "mean"):
            right = reference(model, prompt, pooling)
            for lap in range(2):
                found = np.frombuffer(engine.embeddings[f"{lap}-{index}-{pooling}"], dtype=np.float32)
                assert abs(np.linalg.norm(found) - 1) < 1e-5
                lowest = min(lowest, float(found @ right))
    assert lowest > 0.99999
    assert engine.parts.scheduler.counters.cached_tokens_device > 0, "last pooling may begin behind cached tokens"
    assert abs(float(reference(model, prompts[0], "mean") @ reference(model, prompts[0], "last"))) < 0.99
