"""Config and weights of a GGUF file, under Hugging Face names and in Hugging Face's order of rows."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.host_tensor import HostTensor
from headwater.models.config import MOST_CONTEXT, MOST_FEATURES, MOST_LAYERS, ModelConfig
from headwater.models.end_tokens import gguf_end_ids
from headwater.models.experts.gguf import EXPERT_KEYS, EXPERT_NEUTRAL_VALUES, expert_tensors, read_gguf_experts
from headwater.models.families.gguf import FAMILY_KEYS, GPT_OSS, family_values, norm_stems
from headwater.models.fields import Fields
from headwater.models.gguf_file import GGUFFile
from headwater.models.gguf_rope import FREQ_FACTORS, ROPE_KEYS, ROPE_NEUTRAL_VALUES, read_gguf_rope
from headwater.models.model_files import ModelFileError
from headwater.models.registry import family_of_gguf

# keys of an architecture that are read, or that do not affect the computation
_KNOWN_KEYS = ROPE_KEYS | EXPERT_KEYS | {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count",
}  # fmt: skip
_GENERAL_VALUES = {"general.type": "model", "general.quantization_version": 2}  # else an adapter, or other blocks
# keys that affect the computation, and the values with which they do not
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    **ROPE_NEUTRAL_VALUES,
    **EXPERT_NEUTRAL_VALUES,
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "nextn_predict_layers": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SINKS = "blk.{}.attn_sinks.weight"
_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFWeights:
    """The tensors of a GGUF file, in the file's own formats, one at a time.

    llama.cpp stores the q and k rows of llama models with the two halves of each rotary pair side by side;
    `load` puts them back (see `_halves_apart`).
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.place = file.path
        self._file = file
        self._config = config
        self._permuted = family_of_gguf(
            file.metadata["general.architecture"], has_experts=config.experts is not None
        ).gguf_permutes_qk
        stems = _IN_LAYER | norm_stems(file.metadata["general.architecture"], config.norms)
        self._tensors = {
            _hf_name(name, stems): tensor for name, tensor in file.tensors.items() if name != FREQ_FACTORS
        }
        if config.experts is not None:
            for name, stored, tensor in expert_tensors(file.tensors, config.experts):
                self._tensors.pop(_hf_name(stored, stems), None)
                self._tensors[name] = tensor
        for layer in range(config.num_layers if config.has_sinks else 0):
            sinks = self._tensors.pop(_SINKS.format(layer), None)
            if sinks is not None:
                self._tensors[f"model.layers.{layer}.self_attn.sinks"] = sinks

    def place_of(self, name: str) -> Path:
        return self.place

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def load(self, name: str) -> HostTensor:
        weight = self._file.load(self._tensors[name])
        if self._permuted and ".self_attn.q_proj." in name:
            return weight.take_rows(_halves_apart(weight.shape[0], self._config.num_heads))
        if self._permuted and ".self_attn.k_proj." in name:
            return weight.take_rows(_halves_apart(weight.shape[0], self._config.num_kv_heads))
        return weight


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """The config in a GGUF file's metadata and tensor names. ModelFileError for unknown parts of it."""
    fields = file.fields("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    for key, value in _GENERAL_VALUES.items():
        if fields.raw(key) not in (None, value):
            raise fields.refuse(f"{key} {fields.raw(key)!r} is not supported, only {value!r}")
    architecture = fields.text("general.architecture", "(none given)")
    try:
        family = family_of_gguf(architecture, has_experts=bool(file.metadata.get(f"{architecture}.expert_count")))
    except ValueError as error:
        raise fields.refuse(str(error)) from None
    model = Fields(_of_architecture(file, architecture), source=fields.source)
    _refuse_unknown(model, architecture)
    hidden_size = model.integer("embedding_length", high=MOST_FEATURES)
    num_heads = model.integer("attention.head_count", high=MOST_FEATURES)
    head_dim = model.integer("attention.key_length", max(hidden_size // num_heads, 1), high=MOST_FEATURES)
    for key in ("attention.value_length", "rope.dimension_count"):
        if model.integer(key, head_dim) != head_dim:
            raise fields.refuse(f"{architecture}.{key} {model.raw(key)} is not supported, only the key's {head_dim}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise fields.refuse("lacks tensor 'token_embd.weight' with rows for a vocabulary")
    context = model.integer("context_length", high=MOST_CONTEXT)
    window = model.integer("attention.sliding_window", 0, low=0)
    num_layers = model.integer("block_count", high=MOST_LAYERS)
    try:
        return ModelConfig(
            architecture=family.architectures[0],
            vocab_size=embedding.shape[0],
            hidden_size=hidden_size,
            intermediate_size=model.integer("feed_forward_length", high=MOST_FEATURES),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=model.integer("attention.head_count_kv", num_heads, high=MOST_FEATURES),
            head_dim=head_dim,
            rope=read_gguf_rope(
                file, model, head_dim=head_dim, context=context, truncates=architecture != GPT_OSS
            ),
            norm_eps=model.number("attention.layer_norm_rms_epsilon", 1e-5, low=0.0),
            tie_word_embeddings="output.weight" not in file.tensors,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            o_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
            max_context=context,
            window=window if 0 < window < context else None,
            eos_token_ids=gguf_end_ids(fields, vocab_size=embedding.shape[0]),
            norms=family.norms,
            **family_values(architecture, model, num_layers=num_layers, head_dim=head_dim),
            experts=(
                None
                if family.experts is None
                else read_gguf_experts(
                    model, file.tensors, family.experts, num_layers=num_layers, architecture=architecture
                )
            ),
        )
    except ModelFileError:
        raise
    except ValueError as error:
        raise fields.refuse(str(error)) from None


def _of_architecture(file: GGUFFile, architecture: str) -> dict[str, Any]:
    prefix = architecture + "."
    found = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    return found | {key.removeprefix(prefix): "a long array" for key in file.array_keys if key.startswith(prefix)}


def _refuse_unknown(model: Fields, architecture: str) -> None:
    """ModelFileError for keys that are not read here: the model would be served as if they were absent."""
    for key in model:
        if key in _KNOWN_KEYS or key in FAMILY_KEYS.get(architecture, ()):
            continue
        if key not in _NEUTRAL_VALUES:
            raise model.refuse(f"{architecture}.{key} {model.raw(key)!r} is not known: without it text could be wrong")
        if model.raw(key) not in _NEUTRAL_VALUES[key]:
            raise model.refuse(f"{architecture}.{key} {model.raw(key)!r} is not supported")


def _hf_name(name: str, stems: Mapping[str, str]) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name is kept, and fails the check of shapes."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return name
    layer, stem, kind = match.groups()
    if layer is None:
        return f"{_TOP[stem]}.{kind}" if stem in _TOP else name
    return f"model.layers.{layer}.{stems[stem]}.{kind}" if stem in stems else name


def _halves_apart(num_rows: int, num_heads: int) -> npt.NDArray[np.intp]:
    """The order of rows that takes each head from (x0, y0, x1, y1, ...) back to (x0, x1, ..., y0, y1, ...)."""
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)
