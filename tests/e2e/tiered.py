"""What the tests of the tiers in real processes share: small pools, prompts that do not fit them, their texts."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from running_server import RunningServer
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NUM_DEVICE_TOKENS = 320  # 20 pages
PROMPT_TOKENS = 115  # 7 whole pages; one token at least is always computed
NUM_CACHED = 112
NUM_PROMPTS = 12  # four times what the device holds
DEVICE = ("--dtype", "float32", "--max-total-tokens", str(NUM_DEVICE_TOKENS), "--max-running-requests", "2")
SAMPLING = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
# always restored: for this small model computing is nearly as quick, and a busy machine may tip the balance
HOST = ("--enable-hierarchical-cache", "--hicache-restore-policy", "always")
TIERS = (*DEVICE, *HOST, "--hicache-storage-prefetch-policy", "wait_complete")


# the tiny Llama of tiny_models.py
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def write_tiny_llama(folder: Path, *, seed: int = 0, **changes: int) -> None:
    """A random model in float32, and its tokenizer, without PyTorch: seven seconds of CPU less for a process of tests.

    For tests that compare with no other computation than ours. `changes`: other fields of its config.
    """
    config: dict[str, Any] = LLAMA | changes
    width, between = config["hidden_size"], config["intermediate_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    heights = {"self_attn.q_proj": width, "self_attn.k_proj": kv_width, "self_attn.v_proj": kv_width}
    heights |= {"self_attn.o_proj": width, "mlp.gate_proj": between, "mlp.up_proj": between, "mlp.down_proj": width}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config["vocab_size"], width), "model.norm": (width,)}
    for layer in (f"model.layers.{number}." for number in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}{name}": (height, width) for name, height in heights.items()}
        shapes |= {f"{layer}mlp.down_proj": (width, between)}
        shapes |= {f"{layer}{name}": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    random = np.random.default_rng(seed)
    # norms that are not ones, or nothing would show a lost one; matrices large enough that no token is repeated
    tensors = {
        f"{name}.weight": random.normal(size=shape) * 0.15 if len(shape) == 2 else 1 + random.normal(size=shape) * 0.2
        for name, shape in shapes.items()
    }
    single = {name: values.astype(np.float32) for name, values in tensors.items()}
    save_file(single, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(folder)


def write_byte_tokenizer(folder: Path, *, is_ascii: bool = False) -> None:
    """A tokenizer whose first tokens are single characters; the tests speak in token ids.

    `is_ascii`: only the characters of English and JSON, so that no text can begin a character that has no end.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*alphabet[:94], "\u0120", "\u010a"] if is_ascii else alphabet[:200]  # blank, new line
    backend = Tokenizer(models.BPE(vocab={char: index + 3 for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def prompt(number: int) -> list[int]:
    """Token ids that no other prompt begins with."""
    return [3 + (number * 17 + place * 31) % 200 for place in range(PROMPT_TOKENS)]


def ask(server: RunningServer, number: int, **more: object) -> dict:
    """The answer to a prompt, greedy."""
    body = {"input_ids": prompt(number), "sampling_params": SAMPLING}
    response = server.post("/generate", json=body | more)
    assert response.status_code == 200, response.text
    return response.json()


def details(answer: dict) -> dict[str, int]:
    return answer["meta_info"]["cached_tokens_details"]


def store_of(server: RunningServer) -> dict:
    """What the engine says of its store."""
    return server.get("/hicache/storage-backend").json()["engines"][0]


def wait_stored(server: RunningServer, num_pages: int, limit_s: float = 120.0) -> None:
    """Wait until the store has so many pages and nothing is on its way there."""
    deadline = time.monotonic() + limit_s
    while store_of(server)["num_pages"] < num_pages or store_of(server)["in_flight"]:
        assert time.monotonic() < deadline, store_of(server)
        time.sleep(0.2)


def put_store(server: RunningServer, **body: object) -> httpx.Response:
    return server.put("/hicache/storage-backend", json=body)


def wait_idle(server: RunningServer, limit_s: float = 120.0) -> None:
    """Wait until nothing blocks the engine from being idle."""
    deadline = time.monotonic() + limit_s
    while not server.get("/control/blockers").json()["is_idle"]:
        assert time.monotonic() < deadline, server.get("/control/blockers").text
        time.sleep(0.05)
