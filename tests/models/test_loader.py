"""Loading: identical parameters, clear refusals, identities that change when the weights do."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.devices.cpu.packed_cache import PackedCache
from headwater.devices.cuda.torch_tensors import from_host
from headwater.devices.host_tensor import STORAGE_TYPES, RandomTensor
from headwater.models import loader
from headwater.models.config import ModelConfig, parse_hf_config
from headwater.models.loader import LoadedModel, load_model, open_weights, read_config, resolve_model
from headwater.models.model_files import ModelFileError
from headwater.models.weights import DummyWeights
from tiny_gguf import write_gguf_model

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
QWEN3_MOE = {
    **QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "mlp_only_layers": [0],
}  # fmt: skip
MIXTRAL = {**CONFIG, "architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2}
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
    use_kernels = options.pop("use_kernels", True)
    return load_model(resolve_model(str(path)), device=CpuDevice(use_kernels=use_kernels), **options)


def _tensors(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: from_host(tensor) for name, tensor in loaded.model.iter_named()}


@pytest.mark.parametrize(
    "raw",
    [CONFIG, QWEN3, LLAMA_BIAS, QWEN3_MOE, MIXTRAL],
    ids=["llama", "qwen3", "llama-biases", "qwen3-moe", "mixtral"],
)
@pytest.mark.parametrize("use_kernels", [True, False])
def test_parameters_come_back_by_name(tmp_path: Path, raw: dict[str, Any], use_kernels: bool) -> None:
    """Fused and packed layers must still give each checkpoint tensor, bit by bit."""
    loaded = _load(_save(tmp_path, raw), dtype="bfloat16", use_kernels=use_kernels)
    expected = _parameters(raw)
    found = _tensors(loaded)
    assert list(found) == list(loaded.config.parameter_shapes())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(from_host(loaded.model.get_by_name(name)), tensor), name
    with pytest.raises(KeyError):
        loaded.model.get_by_name("model.layers.9.mlp.up_proj.weight")
    assert loaded.weights_bytes == sum(it.numel() for it in expected.values()) * 2


def test_a_model_in_many_files(tmp_path: Path) -> None:
    parameters = list(_parameters(CONFIG).items())
    whole = _load(_save(tmp_path / "whole", CONFIG), dtype="float32")
    _save(tmp_path / "parts", CONFIG, dict(parameters[:5]))
    save_file(dict(parameters[5:]), tmp_path / "parts" / "model-2.safetensors")
    parts = _load(tmp_path / "parts", dtype="float32")
    for (name, one), (_, other) in zip(_tensors(whole).items(), _tensors(parts).items(), strict=True):
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
    with pytest.raises(ValueError, match=r"weight_scale' of shape \[3\], which this architecture lacks"):
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
        with pytest.raises(ModelFileError, match=r"model\.safetensors\.index\.json: (is|must)"):
            open_weights(files, config, load_format="auto", seed=0)


def test_files_beside_an_index_that_it_does_not_name_are_not_read(tmp_path: Path) -> None:
    """An adapter, or a shard of an earlier export, would be a tensor too many, or a second one of its name."""
    parameters = _parameters(CONFIG)
    _save(tmp_path, CONFIG)
    weights_id = _load(tmp_path, dtype="float32").weights_id
    save_file({"stray": torch.zeros(2)}, tmp_path / "adapter.safetensors")
    (tmp_path / "model-00002-of-00009.safetensors").write_bytes(b"half a download")
    index = {"weight_map": dict.fromkeys(parameters, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = _load(tmp_path, dtype="float32")
    assert loaded.weights_id == weights_id, "nor do they count for what the weights are"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.safetensors", "which is not there"), ("../model.safetensors", "which is not in its folder")],
)
def test_an_index_may_name_files_of_its_folder_alone(tmp_path: Path, name: str, reason: str) -> None:
    _save(tmp_path / "model", CONFIG)
    index = {"weight_map": dict.fromkeys(_parameters(CONFIG), name)}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=rf"index\.json: names the file '{name}', {reason}"):
        _load(tmp_path / "model")
    if name == "none.safetensors":
        _load(tmp_path / "model", load_format="dummy")  # who makes weights up needs none of the files


def test_quantised_tensors_are_refused_by_name(tmp_path: Path) -> None:
    """Read as numbers without their scales they would be weights of nobody."""
    parameters = _parameters(CONFIG)
    name = "model.layers.0.mlp.up_proj.weight"
    parameters[name] = torch.zeros(parameters[name].shape, dtype=torch.int8)
    with pytest.raises(ModelFileError, match=rf"model\.safetensors: tensor '{name}' is of type I8"):
        _load(_save(tmp_path, CONFIG, parameters))


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
    one, two = (_tensors(_load(tmp_path, load_format="dummy")) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    names = list(one)
    assert not torch.equal(one[names[2]], one["model.layers.1." + names[2].split(".", 3)[3]])
    other = DummyWeights(parse_hf_config(CONFIG, {}).parameter_shapes(), seed=3).load(names[2])
    assert isinstance(other, RandomTensor)
    assert not np.allclose(other.to_host().data, one[names[2]].float().numpy(), atol=1e-3)


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


@pytest.mark.parametrize(
    ("raw", "architecture"),
    [
        (CONFIG, "llama"),
        ({**LLAMA_BIAS, "mlp_bias": False}, "llama"),
        ({**CONFIG, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}, "qwen2"),
        (QWEN3, "qwen3"),
        ({**QWEN3_MOE, "norm_topk_prob": True}, "qwen3moe"),
        (MIXTRAL, "llama"),
    ],
    ids=["llama", "llama-biases", "qwen2", "qwen3", "qwen3-moe", "mixtral"],
)
def test_a_gguf_file_gives_the_same_config_and_parameters(
    tmp_path: Path, raw: dict[str, Any], architecture: str
) -> None:
    """The rows of q and k, the tied head and the optional parameters must survive llama.cpp's order."""
    config = parse_hf_config(raw, {})
    parameters = _parameters(raw)
    path = tmp_path / "model.gguf"
    write_gguf_model(path, config, architecture, parameters)
    found = read_config(resolve_model(str(path)))
    assert found.norm_eps == pytest.approx(config.norm_eps)
    assert {**_fields(found), "norm_eps": 0} == {**_fields(config), "norm_eps": 0}
    loaded = _load(path, dtype="bfloat16")
    for name, tensor in _tensors(loaded).items():
        assert torch.equal(tensor, parameters[name]), name


def test_blocks_are_served_as_they_are_where_the_device_can(tmp_path: Path) -> None:
    """They are other weights than rounded ones: the identity must differ, and the size is that of the blocks."""
    config, parameters = parse_hf_config(CONFIG, {}), _parameters(CONFIG)
    path = write_gguf_model(tmp_path / "model.gguf", config, "llama", parameters, block_format="Q8_0")
    files = resolve_model(str(path))
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    plain, kept = (load_model(files, device=CpuDevice(use_kernels=use)) for use in (False, True))
    named = load_model(files, device=CpuDevice(), dtype="bfloat16")
    assert kept.weights_id != plain.weights_id
    assert named.weights_id == load_model(files, device=CpuDevice(use_kernels=False), dtype="bfloat16").weights_id
    num_values = sum(tensor.numel() for tensor in parameters.values())
    num_plain = sum(tensor.numel() for tensor in parameters.values() if tensor.dim() == 1)
    assert named.weights_bytes == 2 * num_values
    assert kept.weights_bytes == (num_values - num_plain) * 34 // 32 + num_plain * STORAGE_TYPES[kept.dtype].itemsize
    for name, tensor in parameters.items():
        found = from_host(kept.model.get_by_name(name)).float()
        assert torch.allclose(found, tensor.float(), atol=0.03), name
        if tensor.dim() == 2:
            values = from_host(plain.model.get_by_name(name))
            assert torch.equal(found, values), "rows of q and k move as whole blocks"


@pytest.mark.parametrize(
    ("raw", "architecture"), [({**QWEN3_MOE, "norm_topk_prob": True}, "qwen3moe"), (MIXTRAL, "llama")]
)
def test_blocks_of_experts_are_served_as_they_are(tmp_path: Path, raw: dict[str, Any], architecture: str) -> None:
    """A file has one tensor for all experts of a layer: each expert must get its own rows."""
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    config, parameters = parse_hf_config(raw, {}), _parameters(raw)
    path = write_gguf_model(tmp_path / "model.gguf", config, architecture, parameters, block_format="Q8_0")
    kept = load_model(resolve_model(str(path)), device=CpuDevice())
    experts = next(layer.mlp for layer in reversed(kept.model.layers)).experts
    assert {packed.format for packed in experts.packed} == {"Q8_0"}
    for name, tensor in parameters.items():
        found = kept.model.get_by_name(name)
        is_router = name.endswith("gate.weight")
        assert torch.allclose(from_host(found).float(), tensor.float(), atol=0 if is_router else 0.03), name


def test_a_gguf_file_without_all_experts_is_refused(tmp_path: Path) -> None:
    config, parameters = parse_hf_config(MIXTRAL, {}), _parameters(MIXTRAL)
    lost = {name: tensor for name, tensor in parameters.items() if ".experts.2.w3." not in name}
    path = write_gguf_model(tmp_path / "model.gguf", config, "llama", lost)
    with pytest.raises(ValueError, match=r"lacks tensor 'model\.layers\.0\.block_sparse_moe\.experts\.0\.w3"):
        _load(path)
    path = write_gguf_model(tmp_path / "2.gguf", config, "llama", parameters, metadata={"llama.expert_gating_func": 2})
    with pytest.raises(ValueError, match=r"expert_gating_func 2 is not supported"):
        _load(path)


@pytest.mark.parametrize("raw", [CONFIG, QWEN3_MOE], ids=["llama", "qwen3-moe"])
def test_plain_weights_are_quantised_on_request(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Matrices alone, in the form that the identity and the size then name; a second time they are not rounded.

    A router stays as it is: a token that goes to another expert is computed by other weights.
    """
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    folder, device = _save(tmp_path, raw), CpuDevice()
    files, parameters = resolve_model(str(folder)), _parameters(raw)
    plain, eight = (load_model(files, device=device, quantization=kind) for kind in ("none", "int8"))
    again = load_model(files, device=device, quantization="int8")
    assert eight.weights_id == again.weights_id != plain.weights_id
    assert eight.weights_bytes < plain.weights_bytes
    for name, tensor in parameters.items():
        found = device.to_host(eight.model.get_by_name(name)).to_float32()
        is_matrix = tensor.dim() == 2 and not name.endswith("mlp.gate.weight")
        assert np.allclose(found, tensor.float().numpy(), atol=0.03 if is_matrix else 0), name
        assert (found == tensor.float().numpy()).all() != is_matrix, name
    made_up = load_model(files, device=device, quantization="int8", load_format="dummy")
    assert made_up.weights_bytes == eight.weights_bytes


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("int8", "quantization 'int8' is not supported here: device 'cpu' computes with plain numbers alone"),
        ("int3", "quantization must be one of none, int8, int4, fp8, found 'int3'"),
    ],
)
def test_a_quantization_that_the_device_lacks_is_refused(tmp_path: Path, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(resolve_model(str(_save(tmp_path, CONFIG))), device=CpuDevice(use_kernels=False), quantization=kind)


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__slots__}


def test_a_gguf_tensor_nobody_knows_is_named(tmp_path: Path) -> None:
    config = parse_hf_config(CONFIG, {})
    path = tmp_path / "model.gguf"
    parameters = _parameters(CONFIG)
    del parameters["model.layers.1.mlp.up_proj.weight"]
    write_gguf_model(path, config, "llama", parameters)
    with pytest.raises(ValueError, match=r"lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        _load(path)


def test_a_split_gguf_file_is_read_whole_whichever_part_is_named(tmp_path: Path) -> None:
    """Large models come in parts; the first alone would lack most of its tensors."""
    config, parameters = parse_hf_config(CONFIG, {}), list(_parameters(CONFIG).items())
    whole = write_gguf_model(tmp_path / "whole.gguf", config, "llama", dict(parameters))
    parts = [tmp_path / f"model-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    for index, part in enumerate(parts):
        split = {"split.no": index, "split.count": 3, "split.tensors.count": len(parameters)}
        write_gguf_model(part, config, "llama", dict(parameters[index::3]), metadata=split)
    expected = _tensors(_load(whole, dtype="float32"))
    ids = set()
    for part in parts:
        loaded = _load(part, dtype="float32")
        ids.add(loaded.weights_id)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in _tensors(loaded).items())
    assert len(ids) == 1
    parts[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(ModelFileError, match=r"is one of 3 parts, and model-00002-of-00003\.gguf is not beside it"):
        _load(parts[2])
    with pytest.raises(ModelFileError, match=r"elsewhere\.gguf: is one of 3 parts by its metadata"):
        _load(tmp_path / "elsewhere.gguf")
    parts[0].rename(parts[1])
    (tmp_path / "elsewhere.gguf").rename(parts[0])
    with pytest.raises(ModelFileError, match="is part 2 by its metadata, part 1 by name"):
        _load(parts[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.rope.scaling.type", "longrope", "'longrope' is not supported"),
        ("llama.rope.scaling.type", "yarn", "rope.scaling.factor is missing"),
        ("llama.rope.dimension_count", 8, r"llama\.rope\.dimension_count 8 is not supported, only the key's 16"),
        ("llama.attention.value_length", 32, "llama.attention.value_length 32 is not supported"),
        ("llama.expert_count", 8, "llama.expert_count 8 is not supported"),
        ("llama.logit_scale", 2.0, "llama.logit_scale 2.0 is not supported"),
        ("llama.rope.scaling.attn_factor", 1.5, "llama.rope.scaling.attn_factor 1.5 is not supported"),
        ("llama.some_new_trick", True, "llama.some_new_trick True is not known"),
        ("llama.context", [1] * 2000, "llama.context 'a long array' is not known"),
        ("llama.rope.scale_linear", "two", "rope.scale_linear must be a number"),
        ("tokenizer.ggml.eos_token_id", 90, r"tokenizer\.ggml\.eos_token_id must be an integer from 0 to 89, found 90"),
        ("general.type", "adapter", "general.type 'adapter' is not supported, only 'model'"),
        ("general.quantization_version", 1, "general.quantization_version 1 is not supported, only 2"),
        ("general.alignment", 0, "general.alignment must be a power of two"),
        ("general.alignment", 48, "general.alignment must be a power of two"),
    ],
)
def test_metadata_of_a_gguf_file_that_is_not_understood_is_refused_by_name(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    """Passed over, it would be served as if it were not there: other text than the model's."""
    path = write_gguf_model(
        tmp_path / "model.gguf", parse_hf_config(CONFIG, {}), "llama", _parameters(CONFIG), metadata={key: value}
    )
    with pytest.raises(ModelFileError, match=rf"model\.gguf: .*{message}"):
        read_config(resolve_model(str(path)))


@pytest.mark.parametrize(
    ("metadata", "kind", "factor"),
    [
        ({"llama.rope.scale_linear": 4.0}, "linear", 4.0),  # before there were types
        ({"llama.rope.scaling.factor": 4.0}, "linear", 4.0),  # as llama.cpp takes it
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "linear", 2.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, "default", 1.0),
        ({"llama.rope.scaling.factor": 0.0, "llama.rope.scale_linear": 0.0}, "default", 1.0),
        ({"llama.rope.dimension_count": 16, "llama.vocab_size": 90, "llama.expert_count": 0}, "default", 1.0),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
             "llama.rope.scaling.yarn_beta_fast": 8.0, "llama.rope.scaling.original_context_length": 64},
            "yarn", 2.0,
        ),
    ],
)  # fmt: skip
def test_the_rotary_scaling_of_a_gguf_file(tmp_path: Path, metadata: dict[str, Any], kind: str, factor: float) -> None:
    config = parse_hf_config(CONFIG, {})
    path = write_gguf_model(tmp_path / "model.gguf", config, "llama", _parameters(CONFIG), metadata=metadata)
    rope = read_config(resolve_model(str(path))).rope
    assert (rope.kind, rope.factor) == (kind, factor)
    assert rope.beta_fast == (8.0 if kind == "yarn" else 32.0)


def test_loading_reads_the_file_it_was_given(tmp_path: Path) -> None:
    """The saved file, read by the safetensors package itself, is the reference for what was loaded."""
    folder = _save(tmp_path, CONFIG)
    loaded = _load(folder, dtype="float32")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(from_host(loaded.model.get_by_name(name)), tensor.float()), name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackedCache:
    """A cache of packed weights, for files that have just been written as well."""
    library = usable_kernels()
    if library is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    monkeypatch.setattr(loader, "_SETTLED_NS", 0)
    return PackedCache(tmp_path / "packed", max_bytes=1 << 30, library=library, min_bytes=0)


def _load_kept(path: Path, cache: PackedCache, **options: Any) -> Any:
    loaded = _load(path, cache=cache, **options)
    cache.wait()
    return loaded


@pytest.mark.parametrize("raw", [CONFIG, QWEN3, LLAMA_BIAS], ids=["llama", "qwen3", "llama-biases"])
def test_a_second_load_maps_what_the_first_has_packed(
    tmp_path: Path, raw: dict[str, Any], cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters under the same identity, without a look into the files."""
    folder = _save(tmp_path / "model", raw)
    first = _load_kept(folder, cache)
    monkeypatch.setattr(loader, "open_weights", lambda *_, **__: pytest.fail("the files were read"))
    second = _load(folder, cache=cache)
    assert (second.weights_id, second.weights_bytes) == (first.weights_id, first.weights_bytes)
    expected = dict(first.model.iter_named())
    for name, tensor in second.model.iter_named():
        assert tensor.format == expected[name].format
        np.testing.assert_array_equal(tensor.data, expected.pop(name).data, err_msg=name)
    assert not expected


def test_a_changed_file_is_never_served_from_the_cache(tmp_path: Path, cache: PackedCache) -> None:
    """Neither one that was replaced nor one that was written to in place, with the old time restored."""
    folder = _save(tmp_path / "model", CONFIG)
    ids = [_load_kept(folder, cache).weights_id]
    parameters = _parameters(CONFIG)
    for is_replaced in (True, False):
        parameters["model.norm.weight"] += 1
        save_file(parameters, folder / "next")
        file, before = folder / "model.safetensors", (folder / "model.safetensors").stat()
        if is_replaced:
            (folder / "next").rename(file)
        else:
            file.write_bytes((folder / "next").read_bytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        loaded = _load_kept(folder, cache)
        norm = loaded.model.get_by_name("model.norm.weight").to_float32()
        np.testing.assert_array_equal(norm, parameters["model.norm.weight"].float().numpy())
        ids.append(loaded.weights_id)
    assert len(set(ids)) == 3


def test_another_form_of_the_same_files_is_packed_by_itself(tmp_path: Path, cache: PackedCache) -> None:
    folder = _save(tmp_path / "model", CONFIG)
    forms: list[dict[str, Any]] = [{}, {"dtype": "float32"}, {"quantization": "int8"}, {"dtype": "float16"}]
    first = [_load_kept(folder, cache, **form).weights_id for form in forms]
    assert [_load(folder, cache=cache, **form).weights_id for form in forms] == first
    assert len(set(first)) == len(forms)
    _load_kept(folder, cache, load_format="dummy")
    assert len(list((tmp_path / "packed").glob("*.packed"))) == len(forms), "random weights are not kept"


def test_a_file_that_may_still_be_written_is_not_kept(
    tmp_path: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write within the resolution of file times would not be seen."""
    monkeypatch.setattr(loader, "_SETTLED_NS", 3600 * 10**9)
    _load_kept(_save(tmp_path / "model", CONFIG), cache)
    assert not (tmp_path / "packed").exists()
