"""A random model that a training run of seconds can teach something: a Llama whose tokens are bytes."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ("<pad>", "<bos>", "<eos>")


def write_tiny_policy(folder: Path, *, seed: int = 1) -> None:
    """Save model and tokenizer, float32, 0.4 M parameters. Ids 0 to 2 are `SPECIAL`, the others bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={it: i for i, it in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    pad, bos, eos = (tokenizer.token_to_id(name) for name in SPECIAL)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{name.strip('<>')}_token": name for name in SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
