"""Loading: identical parameters, clear refusals, identities that change when the weights do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headwater.devices.cpu import CpuDevice
from headwater.models.config import ModelConfig, parse_hf_config
from headwater.models.loader import load_model, open_weights, read_config, resolve_model
from headwater.models.weights import DummyWeights

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 1000.0,
    "eos_token_id": 2,
}
QWEN3 = {**CONFIG, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
LLAMA_BIAS = {**CONFIG, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _parameters(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    shapes = parse_hf_config(raw, {}).parameter_shapes()
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def _save(folder: Path, raw: dict[str, Any], parameters: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(_parameters(raw) if parameters is None else parameters, folder / "model.safetensors")
    return folder


def _load(path: Path, **options: Any) -> Any:
    use_native = options.pop("use_native", True)
    return load_model(resolve_model(str(path)), device=CpuDevice(use_native=use_native), **options)


@pytest.mark.parametrize("raw", [CONFIG, QWEN3, LLAMA_BIAS], ids=["llama", "qwen3", "llama-biases"])
@pytest.mark.parametrize("use_native", [True, False])
def test_parameters_come_back_by_name(tmp_path: Path, raw: dict[str, Any], use_native: bool) -> None:
    """Fused and packed layers must still give each checkpoint tensor, bit by bit."""
    loaded = _load(_save(tmp_path, raw), dtype="bfloat16", use_native=use_native)
    expected = _parameters(raw)
    found = dict(loaded.model.iter_named())
    assert list(found) == list(loaded.config.parameter_shapes())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(loaded.model.get_by_name(name), tensor), name
    with pytest.raises(KeyError):
        loaded.model.get_by_name("model.layers.9.mlp.up_proj.weight")
    assert loaded.weights_bytes == sum(it.numel() for it in expected.values()) * 2


def test_a_model_in_many_files(tmp_path: Path) -> None:
    parameters = list(_parameters(CONFIG).items())
    whole = _load(_save(tmp_path / "whole", CONFIG), dtype="float32")
    _save(tmp_path / "parts", CONFIG, dict(parameters[:5]))
    save_file(dict(parameters[5:]), tmp_path / "parts" / "model-2.safetensors")
    parts = _load(tmp_path / "parts", dtype="float32")
    for (name, one), (_, other) in zip(whole.model.iter_named(), parts.model.iter_named(), strict=True):
        assert torch.equal(one, other), name
    save_file(dict(parameters[:1]), tmp_path / "parts" / "model-3.safetensors")
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is in both"):
        _load(tmp_path / "parts", dtype="float32")


def test_a_tensor_that_is_missing_extra_or_of_another_shape_is_named(tmp_path: Path) -> None:
    """Loading such a checkpoint quietly would serve nonsense."""
    name = "model.layers.1.self_attn.k_proj.weight"
    good = _parameters(CONFIG)
    _save(tmp_path, CONFIG, {key: value for key, value in good.items() if key != name})
    with pytest.raises(ValueError, match=rf"lacks tensor '{name}' \(expected shape \[32, 64\]\)"):
        _load(tmp_path)
    _save(tmp_path, CONFIG, {**good, name: torch.zeros(64, 32)})
    with pytest.raises(ValueError, match=rf"'{name}' has shape \[64, 32\] in the checkpoint, expected \[32, 64\]"):
        _load(tmp_path)
    _save(tmp_path, CONFIG, {**good, "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"weight_scale' of shape \[3\], which this architecture does not have"):
        _load(tmp_path)
    leftovers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    _load(_save(tmp_path, CONFIG, {**good, **leftovers}))


def test_a_folder_must_hold_what_its_index_names(tmp_path: Path) -> None:
    """A checkpoint that has lost a file would pass for one that holds a part of the tensors by intent."""
    parameters = _parameters(CONFIG)
    config = parse_hf_config(CONFIG, {})
    _save(tmp_path, CONFIG, dict(list(parameters.items())[:5]))
    index = tmp_path / "model.safetensors.index.json"
    files = resolve_model(str(tmp_path))
    assert len(open_weights(files, config, load_format="auto", seed=0).shapes()) == 5, "a part, without an index"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(list(parameters)[:5], "model.safetensors")}))
    open_weights(files, config, load_format="auto", seed=0)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(parameters, "model.safetensors")}))
    first = min(set(parameters) - set(list(parameters)[:5]))
    with pytest.raises(ValueError, match=rf"names tensor '{first}'.* \({len(parameters) - 5} are missing\)"):
        open_weights(files, config, load_format="auto", seed=0)
    for damaged in ("{", "[]", "{}"):
        index.write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            open_weights(files, config, load_format="auto", seed=0)


def test_a_tied_head_may_be_in_the_file_all_the_same(tmp_path: Path) -> None:
    """Some checkpoints of tied models repeat the embedding as lm_head."""
    raw = {**CONFIG, "tie_word_embeddings": True}
    parameters = {**_parameters(raw), "lm_head.weight": torch.zeros(90, 64)}
    loaded = _load(_save(tmp_path, raw, parameters))
    assert "lm_head.weight" not in dict(loaded.model.iter_named())


def test_weights_id_is_of_content_config_and_dtype(tmp_path: Path) -> None:
    """KV of one model must never match another's; the name of the folder must not matter."""
    first = _load(_save(tmp_path / "a", CONFIG), dtype="float32").weights_id
    assert len(first) == 32
    assert int(first, 16) >= 0
    assert _load(_save(tmp_path / "b", CONFIG), dtype="float32").weights_id == first
    other = _parameters(CONFIG)
    other["model.norm.weight"][3] += 1
    ids = {
        first,
        _load(_save(tmp_path / "c", CONFIG, other), dtype="float32").weights_id,
        _load(_save(tmp_path / "d", {**CONFIG, "rope_theta": 999.0}), dtype="float32").weights_id,
        _load(tmp_path / "a", dtype="bfloat16").weights_id,
        _load(tmp_path / "a", dtype="float32", load_format="dummy").weights_id,
        _load(tmp_path / "a", dtype="float32", load_format="dummy", seed=1).weights_id,
    }
    assert len(ids) == 6


def test_dummy_weights_need_only_a_config_and_repeat(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    one, two = (dict(_load(tmp_path, load_format="dummy").model.iter_named()) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    names = list(one)
    assert not torch.equal(one[names[2]], one["model.layers.1." + names[2].split(".", 3)[3]])
    other = DummyWeights(parse_hf_config(CONFIG, {}).parameter_shapes(), seed=3)
    assert not torch.equal(other.load(names[2]).to(one[names[2]].dtype), one[names[2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, found 'int8'"),
        ({"load_format": "pickle"}, "load_format must be one of auto, safetensors, gguf, dummy, found 'pickle'"),
        ({"load_format": "gguf"}, "'gguf' does not fit model"),
    ],
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _load(_save(tmp_path, CONFIG), **options)


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message must say what to do, also offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in (str(tmp_path / "none"), "./none", "none.gguf", "a/b/c"):
        with pytest.raises(ValueError, match=r"no such folder or \.gguf file"):
            resolve_model(path)
    with pytest.raises(ValueError, match=r"could not be downloaded.*Check the name and the network, or give"):
        resolve_model("nobody-at-all/no-such-model")
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a file but no \.gguf file"):
        resolve_model(str(file))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"has no \.safetensors files"):
        _load(tmp_path)


def _write_gguf(path: Path, config: ModelConfig, architecture: str, parameters: dict[str, torch.Tensor]) -> None:
    """As llama.cpp's converter writes: its names, and q and k rows of llama in pairs."""
    stems = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
        "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_eos_token_id(config.eos_token_ids[0])
    for name, tensor in parameters.items():
        base, kind = name.rsplit(".", 1)
        values = tensor.float().numpy()
        if architecture == "llama" and base.endswith(("q_proj", "k_proj")):
            num_heads = config.num_heads if base.endswith("q_proj") else config.num_kv_heads
            halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        if base in tops:
            writer.add_tensor(f"{tops[base]}.{kind}", values)
        else:
            layer, stem = base.split(".")[2], base.rsplit(".", 1)[1]
            writer.add_tensor(f"blk.{layer}.{stems[stem]}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("raw", "architecture"),
    [
        (CONFIG, "llama"),
        ({**LLAMA_BIAS, "mlp_bias": False}, "llama"),
        ({**CONFIG, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}, "qwen2"),
        (QWEN3, "qwen3"),
    ],
    ids=["llama", "llama-biases", "qwen2", "qwen3"],
)
def test_a_gguf_file_gives_the_same_config_and_parameters(
    tmp_path: Path, raw: dict[str, Any], architecture: str
) -> None:
    """The rows of q and k, the tied head and the optional parameters must survive llama.cpp's order."""
    config = parse_hf_config(raw, {})
    parameters = _parameters(raw)
    path = tmp_path / "model.gguf"
    _write_gguf(path, config, architecture, parameters)
    found = read_config(resolve_model(str(path)))
    assert found.norm_eps == pytest.approx(config.norm_eps)
    assert {**_fields(found), "norm_eps": 0} == {**_fields(config), "norm_eps": 0}
    loaded = _load(path, dtype="bfloat16")
    for name, tensor in loaded.model.iter_named():
        assert torch.equal(tensor, parameters[name]), name


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__slots__}


def test_a_gguf_tensor_nobody_knows_is_named(tmp_path: Path) -> None:
    config = parse_hf_config(CONFIG, {})
    path = tmp_path / "model.gguf"
    parameters = _parameters(CONFIG)
    del parameters["model.layers.1.mlp.up_proj.weight"]
    _write_gguf(path, config, "llama", parameters)
    with pytest.raises(ValueError, match=r"lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        _load(path)


def test_loading_reads_the_file_it_was_given(tmp_path: Path) -> None:
    """The saved file, read by the safetensors package itself, is the reference for what was loaded."""
    folder = _save(tmp_path, CONFIG)
    loaded = _load(folder, dtype="float32")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(loaded.model.get_by_name(name), tensor.float()), name
