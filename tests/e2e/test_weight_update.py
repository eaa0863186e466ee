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
from safetensors.torch import load_file, save_file
from tiered import write_byte_tokenizer

from tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

PROMPT = [3 + place * 31 % 200 for place in range(60)]  # several pages
NUM_STREAMED = 5000  # more than a fast machine decodes during an update; the client leaves soon after it
NUM_AFTER = 50  # tokens of the new weights that it waits for
NORM = "model.norm.weight"
LAST = "model.layers.2.mlp.down_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose context is long enough for a stream that an update overtakes."""
    folder = tmp_path_factory.mktemp("served")
    make_tiny_model("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2 * NUM_STREAMED}))
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def original(folder: Path) -> Tensors:
    """The served weights by their Hugging Face names."""
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    arguments = ("--model", str(folder), "--dtype", "float32", "--max-total-tokens", str(2 * NUM_STREAMED))
    with RunningServer(*arguments) as running:
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


def ask(server: RunningServer) -> tuple[list[int], dict[str, Any]]:
    """The answer's tokens, and what is said of it."""
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    answer = server.post("/generate", json={"input_ids": PROMPT, "sampling_params": sampling}).json()
    return answer["output_ids"], answer["meta_info"]


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
        sampling = {"temperature": 0, "max_new_tokens": NUM_STREAMED, "ignore_eos": True}
        body = {"input_ids": [*PROMPT, 3], "sampling_params": sampling, "stream": True}
        with httpx.stream("POST", server.url + "/generate", json=body, timeout=120, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line[6:]))
                    has_begun.set()
                    meta = chunks[-1]["meta_info"]
                    if "weights_versions" in meta:
                        first_of_new = meta["weights_versions"][-1][1]
                        if meta["completion_tokens"] >= first_of_new + NUM_AFTER:
                            return

    second = checkpoint(changed(original))
    streaming = threading.Thread(target=read_stream)
    streaming.start()
    assert has_begun.wait(30)
    done = update(server, second, weight_version="second")
    assert (done["num_kept"], done["num_tensors"], done["weight_version"]) == (1, len(original), "second")
    during = ask(server)
    streaming.join(120)
    spans = chunks[-1]["meta_info"]["weights_versions"]
    assert [label for label, _ in spans] == ["default", "second"]
    assert 0 < spans[1][1] < NUM_STREAMED - NUM_AFTER
    assert during[1]["cached_tokens"] == 0, "KV of the old weights was matched"
    assert during[1]["weight_version"] == "second"
    assert during[0] != before, "the changed layer does not show in the answer"
    assert ask(server)[1]["cached_tokens"] > 0, "the new weights' own KV is shared"

    # and back: the answer is the first one again, from KV that was computed anew
    update(server, checkpoint(original, "back"), weight_version="third")
    output, meta = ask(server)
    assert (output, meta["cached_tokens"]) == (before, 0)


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
    output, meta = ask(server)
    assert (output, meta["cached_tokens"]) == (before, 0)


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
    output, meta = ask(server)
    assert output == before
    assert meta["cached_tokens"] > 0, "the weights are the same, so their cache is still good"
    assert norm_values(server) == values
    assert server.get("/get_weight_version").json() == version
    assert server.health() == 200
