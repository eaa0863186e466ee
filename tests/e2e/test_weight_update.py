"""New weights while a real server streams: whole, partial, and broken in every way a trainer's disk can break them."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from running_server import RunningServer
from safetensors.torch import save_file

from headwater.launch.default_model import ensure_default_model
from headwater.models.loader import open_weights, read_config, resolve_model

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is a city that has been known for a thousand years as " * 3  # several pages
NORM = "model.norm.weight"
LAST = "model.layers.29.mlp.down_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original() -> Tensors:
    """The default model's weights by their Hugging Face names."""
    files = resolve_model(str(ensure_default_model()))
    config = read_config(files)
    source = open_weights(files, config, load_format="auto", seed=0)
    return {name: source.load(name).to(torch.bfloat16).contiguous() for name in config.parameter_shapes()}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running.wait_healthy()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors as a safetensors folder; its path."""

    def save(tensors: Tensors, name: str = "checkpoint") -> Path:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    return save


def changed(tensors: Tensors) -> Tensors:
    """The same model with another last layer."""
    return tensors | {LAST: tensors[LAST] * -1.0}


def ask(server: RunningServer, num_tokens: int = 16) -> tuple[str, dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    answer = server.post("/generate", json={"text": PROMPT, "sampling_params": sampling}).json()
    return answer["text"], answer["meta_info"]


def update(server: RunningServer, path: Path, status: int = 200, **more: Any) -> dict[str, Any]:
    answer = server.post("/update_weights_from_disk", json={"model_path": str(path)} | more)
    assert answer.status_code == status, answer.text
    return answer.json()


def norm_values(server: RunningServer) -> list[float]:
    return server.get(f"/get_weights_by_name?name={NORM}&truncate_size=4").json()["values"]


def test_a_stream_goes_on_across_an_update_and_the_new_weights_match_nothing_old(
    server: RunningServer, original: Tensors, checkpoint: Callable[..., Path]
) -> None:
    before, _ = ask(server)
    assert ask(server)[1]["cached_tokens"] > 0
    chunks: list[dict[str, Any]] = []
    has_begun = threading.Event()

    def read_stream() -> None:
        sampling = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
        body = {"text": PROMPT + " the", "sampling_params": sampling, "stream": True}
        with httpx.stream("POST", server.url + "/generate", json=body, timeout=120, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line[6:]))
                    has_begun.set()

    streaming = threading.Thread(target=read_stream)
    streaming.start()
    assert has_begun.wait(30)
    done = update(server, checkpoint(changed(original)), weight_version="second")
    assert (done["num_kept"], done["num_tensors"], done["weight_version"]) == (1, len(original), "second")
    during = ask(server)
    streaming.join(120)
    assert chunks[-1]["meta_info"]["completion_tokens"] == 400
    spans = chunks[-1]["meta_info"]["weights_versions"]
    assert [label for label, _ in spans] == ["default", "second"]
    assert 0 < spans[1][1] < 400
    assert during[1]["cached_tokens"] == 0, "KV of the old weights was matched"
    assert during[1]["weight_version"] == "second"
    assert during[0] != before, "the changed layer does not show in the text"
    assert ask(server)[1]["cached_tokens"] > 0, "the new weights' own KV is shared"

    # and back: the text is the first one again, from KV that was computed anew
    update(server, checkpoint(original, "back"), weight_version="third")
    text, meta = ask(server)
    assert (text, meta["cached_tokens"]) == (before, 0)


def test_a_part_of_the_tensors_is_laid_over_the_rest(
    server: RunningServer, original: Tensors, checkpoint: Callable[..., Path]
) -> None:
    before, _ = ask(server)
    norm = original[NORM]
    done = update(server, checkpoint({NORM: norm * 2}))
    assert done["num_tensors"] == 1
    assert norm_values(server) == (norm * 2)[:4].float().tolist()
    assert ask(server)[1]["cached_tokens"] == 0
    update(server, checkpoint({NORM: norm}, "back"))
    text, meta = ask(server)
    assert (text, meta["cached_tokens"]) == (before, 0)


@pytest.mark.parametrize(
    "damage", ["half_written", "not_a_model", "wrong_shape", "missing_tensor", "no_folder", "empty"]
)
def test_a_broken_checkpoint_changes_nothing(
    server: RunningServer, original: Tensors, checkpoint: Callable[..., Path], damage: str
) -> None:
    """All or nothing: the old weights serve on, their cache stays warm, and the server stays up."""
    before, _ = ask(server)
    values = norm_values(server)
    version = server.get("/get_weight_version").json()
    bad = checkpoint(changed(original) | {NORM: original[NORM] * 3}, "bad")
    file = bad / "model.safetensors"
    match damage:
        case "half_written":
            with file.open("r+b") as open_file:
                open_file.truncate(file.stat().st_size // 2)
        case "not_a_model":
            file.write_bytes(b"\xff" * 5000)
        case "wrong_shape":
            save_file(original | {LAST: original[LAST][:-1].contiguous()}, file)
        case "missing_tensor":
            save_file({name: tensor for name, tensor in original.items() if name != LAST}, file)
            index = {"weight_map": dict.fromkeys(original, "model.safetensors")}
            (bad / "model.safetensors.index.json").write_text(json.dumps(index))
        case "no_folder":
            shutil.rmtree(bad)
        case "empty":
            file.unlink()
    answer = update(server, bad, 400, weight_version="never")
    assert answer["success"] is False
    assert answer["num_paused_requests"] == 0
    assert answer["error"]["param"] == "model_path"
    named = {"wrong_shape": LAST, "missing_tensor": LAST}.get(damage, "")
    assert named in answer["message"]
    text, meta = ask(server)
    assert text == before
    assert meta["cached_tokens"] > 0, "the weights are the same, so their cache is still good"
    assert norm_values(server) == values
    assert server.get("/get_weight_version").json() == version
    assert server.health() == 200
