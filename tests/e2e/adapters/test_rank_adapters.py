"""LoRA adapters of a server of two ranks: the text is that of merged weights in one process, through every change."""

from pathlib import Path

import pytest
from running_server import RunningServer
from tiered import write_byte_tokenizer

from tiny_models import is_greedy_text, make_adapter, make_tiny_model, merged

pytestmark = pytest.mark.slow
PROMPTS = [[5, 9, 17, 3, 44, 8, 21], [60, 61, 62, 7, 7, 100, 33, 20, 11], [4, 3, 2]]


def texts(server: RunningServer, names: list[str | None]) -> list[list[int]]:
    """Of all prompts in one batch, each with its own adapter."""
    sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPTS, "lora_path": names, "sampling_params": sampling}
    answer = server.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return [each["output_ids"] for each in answer.json()]


def test_two_ranks_compute_each_adapter_in_parts(tmp_path: Path) -> None:
    """Catches a part of A or B that belongs to another rank, a sum that counts one twice, and a rank that lags."""
    model = make_tiny_model("llama", tmp_path / "model", num_layers=2)
    write_byte_tokenizer(tmp_path / "model")
    a, b = (make_adapter(model, tmp_path / name, rank=4, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    references = {None: model, "a": merged(model, a), "b": merged(model, b)}

    def check(names: list[str | None], contents: list[str | None]) -> None:
        outputs = texts(server, names)
        for prompt, output, content in zip(PROMPTS, outputs, contents, strict=True):
            assert is_greedy_text(references[content], prompt, output), (names, content)

    arguments = ("--model", str(tmp_path / "model"), "--dtype", "float32", "--threads", "1", "--tp-size", "2")
    more = ("--max-total-tokens", "2048", "--max-loras-per-batch", "2", "--lora-paths", f"one={a},same={a}")
    with RunningServer(*arguments, *more) as server:
        server.wait_healthy()
        check(["one", None, "same"], ["a", None, "a"])
        torn = tmp_path / "torn"
        torn.mkdir()
        (torn / "adapter_config.json").write_text("{}")
        for path, status in ((torn, 400), (b, 200)):
            body = {"lora_name": "one", "lora_path": str(path), "load_inplace": True}
            answer = server.post("/v1/load_lora_adapter", json=body)
            assert answer.status_code == status, answer.text
        check(["one", "same", None], ["b", "a", None])
        answer = server.post("/v1/unload_lora_adapter", json={"lora_name": "same"})
        assert answer.status_code == 200, answer.text
        body = {"lora_name": "again", "lora_path": str(a)}
        assert server.post("/v1/load_lora_adapter", json=body).status_code == 200
        check([None, "again", "one"], [None, "a", "b"])
        config = (b / "adapter_config.json").read_text()
        answer = server.post(
            "/load_lora_adapter_from_tensors",
            params={"lora_name": "sent", "config_dict": config},
            content=(b / "adapter_model.safetensors").read_bytes(),
            headers={"content-type": "application/vnd.safetensors"},
        )
        assert answer.status_code == 200, answer.text
        state = server.get("/server_info").json()["internal_states"][0]
        ids = {each["name"]: each["adapter_id"] for each in state["adapters"]}
        assert ids["sent"] == ids["one"] != ids["again"], "the same content, wherever it came from"
        check(["sent", "again", None], ["b", "a", None])
