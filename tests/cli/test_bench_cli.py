"""`headwater bench steps` on a tiny model with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from headwater.cli.main import app
from headwater.devices.cpu.kernel_library import kernel_library

pytestmark = pytest.mark.slow
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
CASES = ("--case", "1x20", "--case", "3x20", "--case", "40+16")
needs_kernels = pytest.mark.skipif(kernel_library() is None, reason="no CPU kernels here")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def run(folder: str, *arguments: str) -> Any:
    common = ["bench", "steps", "--model", folder, "--load-format", "dummy", "--repeat", "2", "--threads", "2"]
    return CliRunner().invoke(app, [*common, *arguments], env={"NO_COLOR": "1"})


@needs_kernels
def test_the_time_of_every_kind_of_op_beside_its_floor(folder: str) -> None:
    """The kinds add up to the step, so nothing that takes time can hide."""
    result = run(folder, *CASES, "--quantization", "int8", "--profile", "--json")
    assert result.exit_code == 0, result.output
    steps = json.loads(result.stdout)
    assert [step["name"] for step in steps] == ["decode, 1 x 20", "decode, 3 x 20", "prefill, 40 after 16"]
    for step in steps:
        kinds = {kind["kind"]: kind for kind in step["kinds"]}
        assert kinds.keys() >= {"linear Q8_0", "head Q8_0", "attention", "norms", "sampling", "control path"}
        assert sum(kind["ms"] for kind in kinds.values()) == pytest.approx(step["best_ms"])
        assert all(kind["ms"] > 0 for kind in kinds.values())
        assert kinds["linear Q8_0"]["num_ops"] > 1
        assert 0 < kinds["linear Q8_0"]["floor_ms"] < step["floor_ms"]
        assert step["best_ms"] <= step["median_ms"]
        assert step["speed"]["read_gb_s"] > 0


@needs_kernels
def test_the_table(folder: str) -> None:
    lines = run(folder, "--case", "1x20", "--profile").output.splitlines()
    assert lines[0].startswith("decode, 1 x 20")
    assert "ratio" in lines[0]
    assert lines[1].split() == ["ops", "ms", "share", "floor", "ms", "GB/s", "GOP/s"]
    assert any(line.split()[0] == "attention" for line in lines[2:])
    assert len(run(folder, "--case", "1x20").output.splitlines()) == 1, "without --profile"


def test_without_kernels_there_are_times_but_no_profile(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_NATIVE", "0")
    result = run(folder, "--case", "1x20")
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output
    assert "floor" not in result.output
    refused = run(folder, "--profile")
    assert refused.exit_code == 1
    assert "there are none: unset HEADWATER_NATIVE" in refused.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--case", "7"), "ROWSxCONTEXT"), (("--case", "1x5000"), "does not fit the model's context of 256")],
)
def test_a_wrong_case_is_a_sentence(folder: str, arguments: tuple[str, ...], says: str) -> None:
    result = run(folder, *arguments)
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output
