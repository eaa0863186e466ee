"""LoRA adapters on two real engine processes: one text each, a reload, and an engine that dies and has them again."""

import os
import signal
import time
from pathlib import Path

import pytest
from running_server import RunningServer
from tiered import write_byte_tokenizer

from tiny_models import make_adapter, make_tiny_model

pytestmark = pytest.mark.slow
PROMPT = "hello world, hello"


def text(server: RunningServer, name: str | None, *, rank: int) -> list[int]:
    body = {"text": PROMPT, "lora_path": name, "routed_dp_rank": rank}
    body |= {"sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}}
    answer = server.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["output_ids"]


def load(server: RunningServer, name: str, folder: Path, **fields: object) -> None:
    body = {"lora_name": name, "lora_path": str(folder), **fields}
    answer = server.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 200, answer.text


def test_adapters_over_two_engines(tmp_path: Path) -> None:
    """Catches an engine that misses a change, one that restarts without adapters, and KV that outlives a reload."""
    model = make_tiny_model("llama", tmp_path / "model", num_layers=2)
    write_byte_tokenizer(tmp_path / "model")
    a, b = (make_adapter(model, tmp_path / name, rank=4, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    arguments = ("--model", str(tmp_path / "model"), "--dtype", "float32", "--threads", "1", "--dp-size", "2")
    more = ("--engine-restarts", "2", "--max-total-tokens", "2048", "--lora-paths", f"one={a}")
    with RunningServer(*arguments, *more) as server:
        server.wait_healthy()
        load(server, "two", b)
        names = [each["id"] for each in server.get("/v1/models").json()["data"]]
        assert names[1:] == ["one", "two"]
        base, one, two = (text(server, name, rank=0) for name in (None, "one", "two"))
        assert len({tuple(each) for each in (base, one, two)}) == 3
        assert [text(server, name, rank=1) for name in (None, "one", "two")] == [base, one, two]
        load(server, "one", b, load_inplace=True)
        assert [text(server, "one", rank=rank) for rank in (0, 1)] == [two, two]
        assert 'vllm:lora_requests_info{dp_rank="0",max_lora="10"' in server.get("/metrics").text
        os.kill(server.engine_pids()[-1], signal.SIGKILL)
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s:
            engines = server.get("/health").status_code == 200 and server.get("/server_info").json()["internal_states"]
            if engines and all(each["success"] for each in engines):
                break
            time.sleep(0.2)
        assert [text(server, "one", rank=rank) for rank in (0, 1)] == [two, two]
        gone = server.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
        assert gone.status_code == 200, gone.text
        missing = server.post("/v1/completions", json={"model": "one", "prompt": "a"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
