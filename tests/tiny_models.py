"""Tiny random models of every family, made by transformers itself and saved as Hugging Face folders; LoRA adapters."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB_SIZE = 211
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that greedy text does not repeat one token
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_QWEN3_EXPERTS = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.02, 1.1, 1.3, 1.6, 2.0],
    "long_factor": [1.1, 1.3, 1.9, 2.5, 3.5, 4.5],
    "partial_rotary_factor": 0.75,
}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases-mha": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "llama-llama3-rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LLAMA3}),
    "llama-linear-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 24}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-yarn": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": _YARN}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "qwen3-tied-one-kv-head": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**_QWEN3_EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-some-dense": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**_QWEN3_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
MODEL_NAMES = tuple(_MODELS)
# families that differ from these in what registry.py says of them
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.11,
            "logits_scaling": 3.0,
        },
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layer_interval": 2, "no_rope_layers": None}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 11}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"partial_rotary_factor": 0.75, "sliding_window": 21}),
    # texts are longer than the original context when they end: transformers embeds shorter ones in another way
    "phi3-longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16},
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config, {"head_dim": 24, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "olmo3": (Olmo3ForCausalLM, Olmo3Config, {"sliding_window": 7, "layer_types": _LAYER_TYPES}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": 13,
            "layer_types": _LAYER_TYPES,
            "head_dim": 24,
            "query_pre_attn_scalar": 17,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "sliding_window": 13,
            "layer_types": _LAYER_TYPES,
            "head_dim": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": {**_YARN, "rope_theta": 150000.0, "truncate": False},
        },
    ),
}
FAMILY_NAMES = tuple(_FAMILIES)


def make_tiny_model(
    name: str, folder: Path, *, num_layers: int = 3, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Save the model under `folder` and return it, in float32. `changes`: other fields of its config."""
    model_class, config_class, extra = (_MODELS | _FAMILIES)[name]
    torch.manual_seed(sum(name.encode()) + seed)
    model = model_class(config_class(**{**_SIZES, **extra, **changes, "num_hidden_layers": num_layers})).eval()
    with torch.no_grad():  # norms and biases that are not ones and zeros, or nothing would show a lost one
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        scale = getattr(model.model.embed_tokens, "embed_scale", None)
        if scale is not None:  # or each token would be followed by itself
            model.model.embed_tokens.weight.div_(scale)
    model.save_pretrained(folder)
    return model


def served_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters under the names by which the engine knows them: experts that are stacked are single ones there."""
    found = {}
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith("mlp.experts"):
            found[name] = parameter.detach()
            continue
        form = "bias" if kind.endswith("_bias") else "weight"
        for expert, values in enumerate(parameter.detach()):
            values = values if form == "bias" else values.T
            parts = {"gate_proj": values[0::2], "up_proj": values[1::2]} if "gate" in kind else {"down_proj": values}
            found |= {f"{stem}.{expert}.{which}.{form}": part for which, part in parts.items()}
    return found


@torch.inference_mode()
def is_greedy_text(model: PreTrainedModel, prompt: list[int], output: list[int]) -> bool:
    """Whether `greedy_text` is `output`: the same question, all tokens at once."""
    logits = model(torch.tensor([[*prompt, *output]])).logits[0]
    return logits.argmax(dim=-1)[len(prompt) - 1 : -1].tolist() == output


def greedy_text(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates, EOS ignored."""
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        eos_token_id=None,
    )
    return output[0, len(prompt) :].tolist()


# --- LoRA adapters, as PEFT saves them ---------------------------------------------------------------

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PEFT_PREFIX = "base_model.model."


def make_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    rank: int,
    seed: int,
    targets: Sequence[str] = ADAPTED,
    size: float = 0.3,
    **config: Any,
) -> Path:
    """Save random matrices for the modules `targets` of every layer. Returns `folder`."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    ranks = config.get("rank_pattern", {})
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        target = module.rpartition(".")[2]
        if kind == "weight" and target in targets:
            own_rank = ranks.get(target, rank)
            for letter, shape in (("A", (own_rank, parameter.shape[1])), ("B", (parameter.shape[0], own_rank))):
                tensors[f"{_PEFT_PREFIX}{module}.lora_{letter}.weight"] = torch.randn(shape, generator=generator) * size
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def merged(model: PreTrainedModel, folder: Path, *, scale: float = 2.0) -> PreTrainedModel:
    """A copy of the model whose weights are W + scale * B A, the definition of LoRA."""
    found = copy.deepcopy(model)
    parameters, tensors = dict(found.named_parameters()), load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in tensors.items():
            if ".lora_A." in name:
                b = tensors[name.replace(".lora_A.", ".lora_B.")]
                parameters[name.removeprefix(_PEFT_PREFIX).replace(".lora_A", "")] += scale * b @ a
    return found
