"""The rollout loop that got "flush failed" from other servers: 120 turns, two prompts and two flushes in each."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from running_server import RunningServer
from tiered import write_byte_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.load]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
}
NUM_PAGES = 20  # of a prompt; in the benchmark 137


@pytest.fixture
def flush_120(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "serving"))
    spec = importlib.util.spec_from_file_location("flush_120", BENCHMARKS / "flush_120.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    yield module
    for name in ("results", "server_process", "load_client", "workloads"):  # general names, not for others to find
        sys.modules.pop(name, None)


HOST = ("--enable-hierarchical-cache", "--hicache-write-policy", "write_through")


@pytest.mark.parametrize("flushed", ["", "device,host,storage"], ids=["device", "device_host_and_file"])
def test_120_turns(flush_120: ModuleType, tmp_path: Path, flushed: str) -> None:
    """On the device alone, and with everything written through to the host and to files while it is flushed."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_byte_tokenizer(tmp_path)
    store = ("--hicache-storage-backend", "file", "--hicache-storage-dir", str(tmp_path / "store"))
    tiers = (*HOST, *store) if flushed else ()
    arguments = ("--model", str(tmp_path), "--load-format", "dummy", "--kv-cache-memory-mb", "16", *tiers)
    with RunningServer(*arguments) as server:
        server.wait_healthy()
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            records = flush_120.run(http, vocab_size=211, prompt_tokens=NUM_PAGES * 16 + 8, tiers=flushed)
            state = http.get("/cache").json()
    facts = flush_120.summary(records)
    assert facts["num_flushes"] == 240
    assert flush_120.holds(facts), facts
    assert facts["refused_without_timeout"] == 0 or tiers, "nothing is in flight after the answer without other tiers"
    assert all(record["freed_pages"]["device"] >= NUM_PAGES for record in records if record["status"] == 200)
    if flushed:
        moved = state["transfers"]
        num_written = min(moved["offload"]["tokens"], moved["persist"]["tokens"])
        assert num_written > 15_000, "the tiers were not written through"
