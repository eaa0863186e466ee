"""The models of the GPU benchmarks: shapes only, with random weights, a tokenizer in which every token id is a word."""

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "tiny": {  # for trying the scripts out on a CPU
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 12000,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "small": {  # whose text is compared with other programs'
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}
SHAPES["qwen3-30b-a3b"] = SHAPES["qwen3-0.6b"] | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
SHAPES["tiny-experts"] = SHAPES["tiny"] | {  # for trying the scripts out on a CPU
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
SHAPES["llama3.1-70b"] = SHAPES["llama3.1-8b"] | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def make_model(name: str, root: Path) -> Path:
    """A folder that `--load-format dummy` can serve: config.json and a tokenizer of the model's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "hidden_act": "silu"}))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    small = [a for a in letters if a.isascii() and a.isalpha()]
    words = (a + b + c + d for a in small for b in small for c in small for d in small)
    vocabulary = [*letters, *(next(words) for _ in range(config["vocab_size"] - len(letters)))]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def weight_bytes(name: str, num_rows: int = 1) -> int:
    """bf16 bytes that a decode step of so many rows reads: every projection, and the head once.

    Of experts as many as rows hit that choose by chance.
    """
    shape = SHAPES[name]
    hidden, head_dim, num_experts = shape["hidden_size"], shape["head_dim"], shape.get("num_experts", 0)
    qkv = (shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]) * head_dim
    mlp = 3 * hidden * shape["intermediate_size"]
    if num_experts:
        num_hit = num_experts * (1 - (1 - shape["num_experts_per_tok"] / num_experts) ** num_rows)
        mlp = int(3 * hidden * shape["moe_intermediate_size"] * num_hit) + hidden * num_experts
    per_layer = qkv * hidden + shape["num_attention_heads"] * head_dim * hidden + mlp
    return 2 * (shape["num_hidden_layers"] * per_layer + shape["vocab_size"] * hidden)


def kv_token_bytes(name: str) -> int:
    """bf16 bytes of KV of one token."""
    shape = SHAPES[name]
    return 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]


def prefill_flops(name: str, num_tokens: int) -> float:
    """Of one whole prompt: every projection, causal attention, and the head for one token."""
    shape = SHAPES[name]
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    head = shape["vocab_size"] * hidden
    num_weights = weight_bytes(name) // 2 - head
    attention = 4 * num_tokens**2 / 2 * shape["num_attention_heads"] * head_dim * shape["num_hidden_layers"]
    return 2.0 * num_weights * num_tokens + attention + 2 * head
