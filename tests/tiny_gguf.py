"""A tiny model as a GGUF file; reading real ones in less time."""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from headwater.models.config import ModelConfig


def add_metadata(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One entry, of the type that fits the value."""
    kinds = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    for kind, add in kinds:
        if isinstance(value, kind):
            add(key, value)
            return
    writer.add_array(key, value)


def write_gguf_model(
    path: Path,
    config: ModelConfig,
    architecture: str,
    parameters: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    block_format: str = "F32",
) -> Path:
    """As llama.cpp's converter writes: its names, q and k rows of llama in pairs, norms of gemma plus one.

    `metadata` is added.

    Matrices whose rows are whole blocks of 32 numbers are written in `block_format`.
    """
    stems = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    norms = config.norms
    places = (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp)
    gguf_norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    stems |= {name: stem for name, stem in zip(places, gguf_norms, strict=True) if name is not None}
    if architecture == "gpt-oss":
        stems |= {"post_attention_layernorm": "post_attention_norm"}
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
    if "tokenizer.ggml.eos_token_id" not in metadata:
        writer.add_eos_token_id(config.eos_token_ids[0])
    for key, value in metadata.items():
        add_metadata(writer, key, value)
    if config.experts is not None:
        writer.add_expert_count(config.experts.num_experts)
        writer.add_expert_used_count(config.experts.per_token)
        if architecture in ("qwen3moe", "gpt-oss"):
            writer.add_expert_feed_forward_length(config.experts.intermediate_size)
    for name, tensor in _with_experts_stacked(config, parameters).items():
        if name.endswith(".sinks"):
            writer.add_tensor(f"blk.{name.split('.')[2]}.attn_sinks.weight", tensor.float().numpy())
            continue
        base, kind = name.rsplit(".", 1)
        values = tensor.float().numpy()
        num_cols = values.shape[-1]
        if architecture == "gemma3" and base.endswith("norm"):
            values = values + 1
        if architecture in ("llama", "granite", "smollm3") and base.endswith(("q_proj", "k_proj")):
            num_heads = config.num_heads if base.endswith("q_proj") else config.num_kv_heads
            halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        is_matrix = values.ndim > 1 and kind == "weight" and not base.endswith("ffn_gate_inp")
        has_blocks = is_matrix and num_cols % 32 == 0
        if block_format == "MXFP4":  # as llama.cpp writes gpt-oss: the experts alone
            has_blocks = has_blocks and "_exps" in base
        form = gguf.GGMLQuantizationType[block_format if has_blocks else "F32"]
        values = gguf.quants.quantize(values, form)
        if base.startswith("blk."):
            writer.add_tensor(name, values, raw_dtype=form)
        elif base in tops:
            writer.add_tensor(f"{tops[base]}.{kind}", values, raw_dtype=form)
        else:
            layer, stem = base.split(".")[2], base.rsplit(".", 1)[1]
            writer.add_tensor(f"blk.{layer}.{stems[stem]}.{kind}", values, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _with_experts_stacked(config: ModelConfig, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices of a layer's experts as one tensor each, and routers, under llama.cpp's names."""
    found, experts = dict(parameters), config.experts
    if experts is None:
        return found
    for layer in range(config.num_layers):
        if layer in experts.dense_layers:
            continue
        for kind in ("weight", "bias") if experts.has_bias else ("weight",):
            found[f"blk.{layer}.ffn_gate_inp.{kind}"] = found.pop(f"{experts.router(layer)}.{kind}")
            for which, names in zip(("gate", "up", "down"), zip(*experts.matrices(layer), strict=True), strict=True):
                stacked = torch.stack([found.pop(f"{name}.{kind}") for name in names if f"{name}.{kind}" in found])
                found[f"blk.{layer}.ffn_{which}_exps.{kind}"] = stacked
    return found


@contextmanager
def quick_reader() -> Iterator[None]:
    """transformers reads a file twice, number by number from a memory map, and makes a map of names for each module."""
    memmap = np.memmap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", lambda *args, **options: memmap(*args, **options).view(np.ndarray))
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield


@contextmanager
def read_once() -> Iterator[None]:
    """Headwater and transformers both call this package's `dequantize`: two seconds for the default model."""
    right, known = gguf.quants.dequantize, {}

    def dequantize(data: npt.NDArray[Any], kind: gguf.GGMLQuantizationType) -> npt.NDArray[Any]:
        key = kind, data.shape, hashlib.blake2b(data).digest()
        if key not in known:
            known[key] = right(data, kind)
            known[key].flags.writeable = False
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.quants, "dequantize", dequantize)
        patch.setattr(gguf, "dequantize", dequantize)
        yield
