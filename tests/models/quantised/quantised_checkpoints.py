"""Tiny quantised checkpoints in the layouts that publishers use, and the numbers that these hold by definition.

Codes, zeros and scales are drawn at random; words are packed one code at a time, as the formats are described. The
`quantization_config`s are those of real repositories, which their names say.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headwater.devices.number_formats import narrow, widen
from headwater.devices.safetensors_header import build_header
from headwater.models.config import parse_hf_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
EXPERTS = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
Stored = dict[str, tuple[str, npt.NDArray]]  # type in the words of safetensors, and numbers or bits
_STORAGE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "I64": "<i8", "I32": "<i4", "I8": "i1"}


class Module(NamedTuple):
    """A linear layer's tensors under their names in the module, and its weight."""

    stored: Stored
    weight: npt.NDArray[np.float64]


Draw = Callable[[tuple[int, int], np.random.Generator], Module]


def group_weights(config: Mapping[str, Any], **weights: Any) -> dict[str, Any]:
    """A `config_groups` with one group for all linear layers."""
    usual = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "observer": "minmax",
             "observer_kwargs": {}, "symmetric": True}  # fmt: skip
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"]} | config
    return {"group_0": group | {"weights": usual | weights}}


def compressed(form: str, groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    usual = {"global_compression_ratio": 1.24, "ignore": ["lm_head"], "kv_cache_scheme": None}
    known = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    return {"config_groups": groups, "format": form, **usual, **known, **more}


_DYNAMIC = {"input_activations": {"actorder": None, "dynamic": True, "num_bits": 8, "strategy": "token",
                                  "symmetric": True, "type": "float"}}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    # Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4
    "gptq": {"bits": 4, "damp_percent": 0.01, "desc_act": False, "group_size": 128, "model_file_base_name": "model",
             "model_name_or_path": None, "modules_in_block_to_quantize": None, "quant_method": "gptq",
             "quantizer": "auto_gptq:0.8.0.dev0+cu1210", "static_groups": False, "sym": True,
             "true_sequential": True},
    # TheBloke/Llama-2-7B-Chat-GPTQ, branch gptq-4bit-32g-actorder_True
    "gptq-act-order": {"bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": True, "sym": True,
                       "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
                       "quant_method": "gptq"},
    "gptq-asymmetric": {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "quant_method": "gptq",
                        "checkpoint_format": "gptq"},
    # as GPTQModel writes it
    "gptq-v2": {"bits": 4, "group_size": 64, "desc_act": False, "sym": False, "lm_head": False, "pack_dtype": "int32",
                "quant_method": "gptq", "checkpoint_format": "gptq_v2", "meta": {"quantizer": ["gptqmodel:2.0.0"]}},
    # Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8
    "gptq-int8": {"bits": 8, "group_size": 128, "desc_act": False, "sym": True, "quant_method": "gptq"},
    # hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4
    "awq": {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
            "zero_point": True, "do_fuse": False, "exllama_config": {"version": 1, "max_batch_size": 1}},
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16
    "packed": compressed("pack-quantized", group_weights({}, num_bits=4, type="int", strategy="group",
                                                         group_size=128)),
    "packed-asymmetric": compressed("pack-quantized", group_weights({}, num_bits=4, type="int", strategy="group",
                                                                    group_size=32, symmetric=False)),
    "packed-act-order": compressed("pack-quantized", group_weights({}, num_bits=4, type="int", strategy="group",
                                                                   group_size=64, actorder="group")),
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a16
    "packed-int8": compressed("pack-quantized", group_weights({}, num_bits=8, type="int", strategy="channel")),
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8
    "int8": compressed("int-quantized", group_weights(_DYNAMIC, num_bits=8, type="int", strategy="channel")),
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic
    "float8-channel": compressed("float-quantized", group_weights(_DYNAMIC, num_bits=8, type="float",
                                                                  strategy="channel")),
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8
    "float8-tensor": compressed("float-quantized", group_weights({}, num_bits=8, type="float", strategy="tensor"),
                                kv_cache_scheme={"num_bits": 8, "strategy": "tensor", "type": "float"}),
    "float8-blocks": compressed("float-quantized", group_weights({}, num_bits=8, type="float", strategy="block",
                                                                 block_structure=[128, 128])),
    # Qwen/Qwen3-8B-FP8, deepseek-ai/DeepSeek-V3
    "fp8": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    # neuralmagic/Meta-Llama-3-8B-Instruct-FP8
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
}  # fmt: skip
NAMES = tuple(CONFIGS)


def write_checkpoint(
    folder: Path, name: str, *, num_shards: int = 1, model: Mapping[str, Any] = CONFIG, **more: Any
) -> dict[str, npt.NDArray]:
    """A folder in the layout `name`. Returns the parameters, as the numbers that the stored ones mean."""
    rng = np.random.default_rng(sum(name.encode()))
    config = {**model, "quantization_config": CONFIGS[name] | more}
    parameters, stored = {}, {}
    for parameter, shape in parse_hf_config(model, {}).parameter_shapes().items():
        module = parameter.removesuffix(".weight")
        if not module.endswith("_proj"):
            numbers = narrow(rng.normal(scale=0.1, size=shape).astype(np.float32), "bfloat16")
            stored[parameter], parameters[parameter] = ("BF16", numbers), widen(numbers, "bfloat16")
            continue
        found = draw(name, (shape[0], shape[1]), rng)
        stored |= {f"{module}.{each}": tensor for each, tensor in found.stored.items()}
        parameters[parameter] = found.weight
    if config["quantization_config"].get("kv_cache_scheme"):
        stored["model.layers.0.self_attn.k_scale"] = ("F32", np.ones(1))
    write_folder(folder, config, stored, num_shards=num_shards)
    return parameters


def write_folder(folder: Path, config: Mapping[str, Any], stored: Stored, *, num_shards: int = 1) -> None:
    """config.json, the tensors in some files, and their index if there are several. Names go round the files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    shards: list[Stored] = [{} for _ in files]
    for i, (name, tensor) in enumerate(stored.items()):
        shards[i % num_shards][name] = tensor
    for file, shard in zip(files, shards, strict=True):
        header = build_header((name, dtype, values.shape) for name, (dtype, values) in shard.items())
        data = b"".join(np.asarray(values).astype(_STORAGE[dtype]).tobytes() for dtype, values in shard.values())
        (folder / file).write_bytes(header + data)
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    if num_shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def draw(name: str, shape: tuple[int, int], rng: np.random.Generator) -> Module:
    """One module in the layout `name`."""
    config = CONFIGS[name]
    weights = config.get("config_groups", {}).get("group_0", {}).get("weights", config)
    if "float8" in name or "fp8" in name:
        return _float8(name, shape, rng)
    bits = weights.get("bits") or weights["num_bits"]
    group = weights["group_size"] or shape[1]
    is_symmetric = weights.get("sym", weights.get("symmetric", name != "awq"))
    middle, most = 1 << (bits - 1), (1 << bits) - 1
    num_groups = -(-shape[1] // group)
    codes = rng.integers(0, most + 1, size=shape)
    zeros = rng.integers(
        middle if is_symmetric else 0, middle + 1 if is_symmetric else most + 1, (shape[0], num_groups)
    )
    scales = (rng.uniform(0.5, 2.0, size=zeros.shape) / (1 << bits)).astype(np.float16)
    groups = np.arange(shape[1]) // group
    if name.endswith("act-order"):
        groups = rng.permutation(groups)
    weight = (codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]
    if name == "int8":
        bf16 = narrow(scales.astype(np.float32), "bfloat16")
        weight = (codes - 128.0) * widen(bf16, "bfloat16")
        return Module({"weight": ("I8", codes - 128), "weight_scale": ("BF16", bf16)}, weight)
    if name.startswith("packed"):
        stored: Stored = {
            "weight_packed": ("I32", pack(codes, bits)),
            "weight_scale": ("F16", scales),
            "weight_shape": ("I64", np.array(shape)),
        }
        if not is_symmetric:
            stored["weight_zero_point"] = ("I32", pack(zeros.T, bits).T)
        if name.endswith("act-order"):
            stored["weight_g_idx"] = ("I32", groups)
        return Module(stored, weight)
    if name == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return Module(
            {
                "qweight": ("I32", pack(codes.T, bits, order)),
                "qzeros": ("I32", pack(zeros.T, bits, order)),
                "scales": ("F16", scales.T),
            },
            weight,
        )
    lower = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    return Module(
        {
            "qweight": ("I32", pack(codes, bits).T),
            "qzeros": ("I32", pack((zeros.T - lower) & most, bits)),
            "scales": ("F16", scales.T),
            "g_idx": ("I32", groups),
        },
        weight,
    )


def pack(codes: npt.NDArray, bits: int, order: tuple[int, ...] | None = None) -> npt.NDArray[np.int32]:
    """[rows, columns] to [rows, columns / n]: code i of a word is that of column order[i] of its n."""
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word))).astype(np.uint64)
    words = np.zeros((len(padded), padded.shape[1] // per_word), np.uint64)
    for i, place in enumerate(order or range(per_word)):
        words |= padded[:, place::per_word] << np.uint64(bits * i)
    return words.astype(np.uint32).view(np.int32)


def _float8(name: str, shape: tuple[int, int], rng: np.random.Generator) -> Module:
    codes = narrow(rng.normal(scale=100.0, size=shape).astype(np.float32), "float8_e4m3fn")
    values = widen(codes, "float8_e4m3fn").astype(np.float64)
    if name in ("fp8", "float8-blocks"):
        tiles = (-(-shape[0] // 128), -(-shape[1] // 128))
        scales = narrow(rng.uniform(1e-4, 1e-3, size=tiles).astype(np.float32), "bfloat16")
        spread = np.kron(widen(scales, "bfloat16"), np.ones((128, 128)))[: shape[0], : shape[1]]
        key = "weight_scale_inv" if name == "fp8" else "weight_scale"
        return Module({"weight": ("F8_E4M3", codes), key: ("BF16", scales)}, values * spread)
    if name == "float8-channel":
        wide = rng.uniform(1e-4, 1e-3, size=(shape[0], 1)).astype(np.float32)
        return Module({"weight": ("F8_E4M3", codes), "weight_scale": ("F32", wide)}, values * wide)
    one = np.float32(rng.uniform(1e-4, 1e-3))
    scale = np.full((), one) if name == "fp8-tensor" else np.full(1, one)
    stored: Stored = {"weight": ("F8_E4M3", codes), "weight_scale": ("F32", scale), "input_scale": ("F32", scale)}
    return Module(stored, values * one)
