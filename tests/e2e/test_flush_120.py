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

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}


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


@pytest.mark.parametrize("tiers", [(), ("--enable-hierarchical-cache",)], ids=["device", "device_and_host"])
def test_120_turns(flush_120: ModuleType, tmp_path: Path, tiers: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_byte_tokenizer(tmp_path)
    arguments = ("--model", str(tmp_path), "--load-format", "dummy", "--kv-cache-memory-mb", "16", *tiers)
    with RunningServer(*arguments) as server:
        server.wait_healthy()
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            records = flush_120.run(http, vocab_size=211)
    facts = flush_120.summary(records)
    assert facts["num_flushes"] == 240
    assert flush_120.holds(facts), facts
    assert facts["refused_without_timeout"] == 0 or tiers, "nothing is in flight after the answer without other tiers"
    assert all(record["freed_pages"]["device"] >= 137 for record in records if record["status"] == 200)
