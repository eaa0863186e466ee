"""Adapters in PEFT's layout: what is honoured, what is refused by its name, and what makes two adapters the same."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from headwater.devices.adapters import Adapter
from headwater.models.adapters.adapter import find_adapter, read_adapter
from headwater.models.config import ModelConfig, parse_hf_config
from headwater.models.experts.config import QWEN3_EXPERTS, ExpertsConfig
from headwater.models.model_files import ModelFileError

CONFIG: ModelConfig = parse_hf_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    },
    {},
)
SIZES = {"q_proj": (16, 16), "v_proj": (8, 16), "down_proj": (16, 24)}
BLOCKS = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}


def tensors(rank: int = 4, *, ranks: dict[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    random, found = np.random.default_rng(seed), {}
    for layer in range(2):
        for name, (num_out, num_in) in SIZES.items():
            stem = f"base_model.model.model.layers.{layer}.{BLOCKS[name]}.{name}"
            size = (ranks or {}).get(name, rank)
            found[f"{stem}.lora_A.weight"] = random.normal(size=(size, num_in)).astype(np.float32)
            found[f"{stem}.lora_B.weight"] = random.normal(size=(num_out, size)).astype(np.float32)
    return found


def save(folder: Path, found: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if found is None else found, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(SIZES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def read(folder: Path, *, max_rank: int = 8, form: str = "float32") -> Adapter:
    return read_adapter(folder, CONFIG, max_rank=max_rank, form=form)


def test_matrices_come_with_their_scale(tmp_path: Path) -> None:
    adapter = read(save(tmp_path))
    assert set(adapter.matrices) == {(layer, name) for layer in (0, 1) for name in ("q", "v", "down")}
    found = adapter.matrices[1, "down"]
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(found.a.data, tensors()[name])
    assert (found.b.shape, found.scale, adapter.rank) == ((16, 4), 2.0, 4)
    assert [index for index, _ in adapter.at(0, "qkv")] == [0, 2]


@pytest.mark.parametrize(
    ("config", "ranks", "expected"),
    [
        ({"use_rslora": True}, {}, {"q": 8 / 2, "v": 8 / 2, "down": 8 / 2}),
        ({"alpha_pattern": {"v_proj": 12}}, {}, {"q": 2, "v": 3, "down": 2}),
        ({"rank_pattern": {"self_attn.q_proj": 2}}, {"q_proj": 2}, {"q": 4, "v": 2, "down": 2}),
        ({"rank_pattern": {"v_proj": 1}, "use_rslora": True}, {"v_proj": 1}, {"q": 4, "v": 8, "down": 4}),
    ],
)
def test_patterns_and_rslora_change_the_scale(
    tmp_path: Path, config: dict[str, Any], ranks: dict[str, int], expected: dict[str, float]
) -> None:
    adapter = read(save(tmp_path, tensors(ranks=ranks), **config))
    assert {name: adapter.matrices[0, name].scale for name in expected} == pytest.approx(expected)


def test_what_only_says_how_it_was_trained_is_accepted(tmp_path: Path) -> None:
    more = {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "peft_version": "0.21.2", "use_dora": None}
    assert read(save(tmp_path, **more, an_option_that_is_off=False)).rank == 4


def test_a_pattern_may_name_one_module_whole(tmp_path: Path) -> None:
    adapter = read(save(tmp_path, alpha_pattern={"^model.layers.1.self_attn.q_proj": 40}))
    assert [adapter.matrices[layer, "q"].scale for layer in (0, 1)] == [2.0, 10.0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names 'lm_head'"),
        ({"target_modules": ["q_proj", "k_proj"]}, "has no tensors of 'k_proj'"),
        ({"rank_pattern": {".*q_proj": 2}}, "rank_pattern '.*q_proj' is a regular expression"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern of 'q_proj' must be an integer"),
        ({"r": 16}, "expected shape [16, 24]"),
        ({"r": 0}, "r must be an integer"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"an_option_of_next_year": {"gate": True}}, "an_option_of_next_year is not known here"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelFileError) as refused:
        read(save(tmp_path, **config), max_rank=64)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "an adapted embedding"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.lm_head.lora_A.weight", "'lm_head'"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "layers.7"),
        ("base_model.model.model.norm.weight", "is no matrix of a LoRA adapter"),
    ],
)
def test_tensors_that_would_be_ignored_are_refused(tmp_path: Path, extra: str, words: str) -> None:
    found = tensors() | {extra: np.zeros((4, 16), dtype=np.float32)}
    with pytest.raises(ModelFileError) as refused:
        read(save(tmp_path, found))
    assert words in str(refused.value)


@pytest.mark.parametrize("name", ["mlp.experts.3.gate_proj", "mlp.gate"])
def test_an_adapter_of_experts_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """It would be taken for one of the layer's MLP."""
    experts = ExpertsConfig(4, 2, 24, renormalises=True, names=QWEN3_EXPERTS.names)
    module = f"model.layers.0.{name}"
    shape = {"mlp.gate": (4, 16)}.get(name, (24, 16))
    pair = {f"base_model.model.{module}.lora_A.weight": np.zeros((4, 16), dtype=np.float32)}
    pair[f"base_model.model.{module}.lora_B.weight"] = np.zeros((shape[0], 4), dtype=np.float32)
    attention = {key: value for key, value in tensors().items() if "self_attn" in key}
    folder, served = save(tmp_path / "a", attention, target_modules=[]), replace(CONFIG, experts=experts)
    assert set(read_adapter(folder, served, max_rank=8, form="float32").matrices) == {
        (layer, name) for layer in (0, 1) for name in ("q", "v")
    }
    folder = save(tmp_path / "b", attention | pair, target_modules=[])
    with pytest.raises(ModelFileError, match=f"adapts '{module}'.*(not supported)"):
        read_adapter(folder, served, max_rank=8, form="float32")


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    found = tensors()
    del found["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    with pytest.raises(ModelFileError, match=r"lora_B.weight' is missing, expected shape \[8, 4\]"):
        read(save(tmp_path, found))


def test_a_rank_above_the_limit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="has rank 4; --max-lora-rank is 2"):
        read(save(tmp_path), max_rank=2)


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    """A copy is the same adapter; other numbers, another scale or another format are not."""
    ids = [
        read(save(tmp_path / "one")).adapter_id,
        read(save(tmp_path / "other numbers", tensors(seed=1))).adapter_id,
        read(save(tmp_path / "other scale", lora_alpha=9)).adapter_id,
        read(save(tmp_path / "rslora", use_rslora=True)).adapter_id,
        read(tmp_path / "one", form="bfloat16").adapter_id,
    ]
    assert len(set(ids)) == len(ids)
    assert read(save(tmp_path / "a copy", base_model_name_or_path="elsewhere")).adapter_id == ids[0]
    same_scale = save(tmp_path / "same scale", use_rslora=True, lora_alpha=8 / math.sqrt(4))
    assert read(same_scale).adapter_id == ids[0]


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelFileError, match=r"has no adapter_model.safetensors, only adapter_model.bin"):
        read(folder)


def test_hub_ids_need_permission(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder of this machine; it is not allowed"):
        find_adapter("someone/adapter", hub_refusal="it is not allowed")
    with pytest.raises(ValueError, match=r"is no folder; an adapter is a folder with adapter_config\.json"):
        find_adapter(str(save(tmp_path) / "adapter_config.json"), hub_refusal=None)
    assert find_adapter(str(tmp_path), hub_refusal="it is not allowed") == tmp_path
