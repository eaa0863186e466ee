"""What an engine is built with, from the arguments and the model's files."""

from pathlib import Path
from typing import Any

import pytest

from headwater.execution.weight_store import WeightStore
from headwater.launch.assembly import build_engine
from headwater.launch.config import ServerArgs
from tiny_models import make_tiny_model

pytestmark = pytest.mark.slow


def built(folder: Path, tmp_path: Path, **args: Any) -> Any:
    """The facts that an engine tells its clients."""
    given = ServerArgs(model=str(folder), dtype="float32", max_total_tokens=400, device="cpu", **args)
    loop = build_engine(given, f"ipc://{tmp_path}/engine")
    ready = loop._ready
    loop.stop()
    loop.run()
    return ready


@pytest.fixture
def windowed(tmp_path: Path) -> Path:
    """A model that sees 64 tokens at most, of a context of 256."""
    make_tiny_model("mistral", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": null', '"sliding_window": 64'))
    return tmp_path / "model"


def test_a_windowed_model_is_served_with_its_whole_context(windowed: Path, tmp_path: Path) -> None:
    assert built(windowed, tmp_path).max_context == 256
    assert built(windowed, tmp_path, context_length=100).max_context == 100


def test_an_answer_ends_where_the_tokenizer_named_ends(tmp_path: Path) -> None:
    """With --tokenizer the vocabulary that is served has its own control tokens."""
    make_tiny_model("llama", tmp_path / "model")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(
        '{"added_tokens": [{"id": 5, "content": "<|im_end|>", "special": true},'
        ' {"id": 5000, "content": "<|eot_id|>", "special": true}]}'
    )
    assert built(tmp_path / "model", tmp_path).eos_token_ids == (2,)
    ready = built(tmp_path / "model", tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    assert ready.eos_token_ids == (2, 5), "5000 is beyond the model's vocabulary"


def test_a_refused_hub_id_names_the_flag_that_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of weights knows no flags: the words are the launcher's."""
    make_tiny_model("llama", tmp_path / "model")
    refusals: list[str | None] = []

    def noted(*args: Any, hub_refusal: str | None, **options: Any) -> WeightStore:
        refusals.append(hub_refusal)
        return WeightStore(*args, hub_refusal=hub_refusal, **options)

    monkeypatch.setattr("headwater.launch.served_model.WeightStore", noted)
    built(tmp_path / "model", tmp_path)
    built(tmp_path / "model", tmp_path, allow_hub=True)
    assert refusals[0] is not None and "--allow-hub" in refusals[0]
    assert refusals[1] is None


@pytest.mark.parametrize(("asked", "chunk", "gap_s"), [
    ({}, 512, 0.2), ({"chunked_prefill_size": 300}, 300, None),
    ({"max_gap_ms": 25.0}, 512, 0.025), ({"chunked_prefill_size": 300, "max_gap_ms": 50.0}, 300, 0.05),
])  # fmt: skip
def test_chunks_leave_streams_a_gap_unless_their_size_was_asked_for(
    tmp_path: Path, asked: dict[str, Any], chunk: int, gap_s: float | None
) -> None:
    make_tiny_model("llama", tmp_path / "model")
    given = ServerArgs(model=str(tmp_path / "model"), dtype="float32", max_total_tokens=400, device="cpu", **asked)
    loop = build_engine(given, f"ipc://{tmp_path}/engine")
    limits = loop._scheduler.limits
    loop.stop()
    loop.run()
    assert (limits.prefill_chunk_tokens, limits.max_gap_s) == (chunk, gap_s)
