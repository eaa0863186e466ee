#!/usr/bin/env python3
"""The served model's tokenizer as a Hugging Face folder, for load tools that count tokens themselves.

    python integrations/tokenizer_folder.py http://127.0.0.1:30000 TOKENIZER

A GGUF file holds a tokenizer in another form, and tools that read it through transformers split digits otherwise. So
the folder is written from the very tokenizer that the server uses.
"""

import json
import sys
import urllib.request
from pathlib import Path

from headwater.tokenization.gguf_tokenizer import load_gguf_tokenizer
from headwater.tokenization.hf_tokenizer import load_hf_tokenizer


def write_tokenizer_folder(url: str, folder: Path) -> None:
    """Write tokenizer.json and its settings for the model served at `url`, whose files must be on this machine."""
    with urllib.request.urlopen(f"{url}/model_info", timeout=30) as answer:
        info = json.load(answer)
    path = info["tokenizer_path"]
    parts = load_gguf_tokenizer(Path(path)) if path.endswith(".gguf") else load_hf_tokenizer(path)
    folder.mkdir(parents=True, exist_ok=True)
    parts.backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": parts.chat_templates.get("default"),
        "model_max_length": 1 << 20,
        **parts.special_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {  # some tools look for one; Dynamo also for the tokens that end a text
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "eos_token_id": parts.backend.token_to_id(str(parts.special_tokens.get("eos_token") or "")),
        "bos_token_id": parts.backend.token_to_id(str(parts.special_tokens.get("bos_token") or "")),
        "vocab_size": parts.backend.get_vocab_size(),
        "max_position_embeddings": info.get("max_context_length") or 1 << 20,
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: tokenizer_folder.py URL FOLDER")
    write_tokenizer_folder(sys.argv[1].rstrip("/"), Path(sys.argv[2]))
