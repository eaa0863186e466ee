"""Damaged files of every kind: loaded, or refused with the one error that names a file; nothing else, and quickly.

Thousands of small mutations of a tiny model's files. What a reader's own library raises, an index out of range or
gigabytes asked for by a damaged count would be a traceback at the start, or the end of a server that serves.
"""

import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from headwater.models.config import parse_hf_config
from headwater.models.loader import open_weights, read_config, resolve_model
from headwater.models.model_files import ModelFileError
from headwater.models.sampling_defaults import read_sampling_defaults
from headwater.models.weights import check_shapes
from headwater.tokenization.tokenizer import Tokenizer
from tiny_gguf import write_gguf_model

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "tie_word_embeddings": True,
    "layer_types": ["full_attention"],
    "sliding_window": None,
    "eos_token_id": 2,
}  # fmt: skip
MOST_GROWTH_KIB = 400 << 10


def _tokenizer_json() -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>", "<|begin|>"])
    return json.loads(backend.to_str())


def _folder(folder: Path) -> Path:
    folder.mkdir()
    parameters = {name: torch.zeros(shape) for name, shape in parse_hf_config(CONFIG, {}).parameter_shapes().items()}
    save_file(parameters, folder / "model.safetensors")
    token = {"content": "<|begin|>", "special": True}
    files = {
        "config.json": CONFIG,
        "generation_config.json": {"eos_token_id": [2, "<|im_end|>"], "temperature": 0.6, "top_k": 20},
        "tokenizer.json": _tokenizer_json(),
        "tokenizer_config.json": {"bos_token": token, "eos_token": "<|im_end|>", "add_bos_token": True,
                                  "added_tokens_decoder": {"257": token}, "chat_template": "{{ messages }}"},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        "model.safetensors.index.json": {"weight_map": dict.fromkeys(parameters, "model.safetensors")},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _gguf(path: Path) -> Path:
    raw = {**CONFIG, "architectures": ["LlamaForCausalLM"], "rope_parameters": None}
    config = parse_hf_config(raw, {})
    parameters = {name: torch.zeros(shape) for name, shape in config.parameter_shapes().items()}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
        "general.alignment": 32,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
    }
    return write_gguf_model(path, config, "llama", parameters, metadata=metadata)


def _load_all(path: Path) -> None:
    """Everything that a start reads of a model's files."""
    files = resolve_model(str(path))
    config = read_config(files)
    source = open_weights(files, config, load_format="auto", seed=0)
    shapes = config.parameter_shapes()
    check_shapes(shapes, source, tied_head=config.tie_word_embeddings)
    for name in shapes:
        source.load(name).to_float32()
    config.rope.inv_freq(config.head_dim)
    read_sampling_defaults(files.folder, gguf=files.gguf)
    Tokenizer.load(path)


def _mutated(content: bytes, source: random.Random, *, head_bytes: int) -> bytes:
    """One or a few small damages, most of them where the file's structure is."""
    damaged = bytearray(content)
    for _ in range(source.choice([1, 1, 1, 2, 5])):
        at = source.randrange(max(1, min(len(damaged), head_bytes)))
        match source.randrange(6):
            case 0:
                damaged[at : at + 1] = bytes([source.randrange(256)])
            case 1:
                damaged[at] ^= 1 << source.randrange(8)
            case 2:
                del damaged[at : at + source.choice([1, 4, 8, 64])]
            case 3:
                damaged[at:at] = source.randbytes(source.choice([1, 4, 8]))
            case 4:
                damaged[at : at + 8] = source.choice([b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x80", b"\0\0\0\x40" * 2])
            case _:
                del damaged[at:]
        damaged = damaged or bytearray(b"\0")
    return bytes(damaged)


def _json_mutated(content: bytes, source: random.Random) -> bytes:
    """A value of the JSON replaced by one of another kind or size."""
    root = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(items):
            places.append((node, key))
            if isinstance(value, dict | list) and len(value) < 50:
                walk(value)

    walk(root)
    strange = [None, True, -1, 0, 0.5, 10**18, 10**400, "x", "", [], {}, [None], {"a": None}, float("nan"), [[1]]]
    for _ in range(source.choice([1, 1, 2])):
        node, key = source.choice(places)
        node[key] = source.choice(strange)
    return json.dumps(root).encode()


def _try_all(path: Path, file: Path, mutants: Callable[[random.Random], bytes], *, num: int, least: int = 1) -> None:
    whole = file.read_bytes()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_refused = 0
    for seed in range(num):
        file.write_bytes(mutants(random.Random(seed)))
        try:
            _load_all(path)
        except ModelFileError as error:
            num_refused += 1
            if str(path.parent) not in str(error) or "\n" in str(error):
                raise AssertionError(f"{file.name}, seed {seed}: {error}") from error
        except BaseException as error:
            raise AssertionError(f"{file.name}, seed {seed}: {type(error).__name__}: {error}") from error
    file.write_bytes(whole)
    _load_all(path)
    assert num_refused >= least, "too little was damaged to show anything"
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < MOST_GROWTH_KIB, f"{grown_kib >> 10} MiB were allocated for a file of {len(whole)} bytes"


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    path = _gguf(tmp_path / "model.gguf")
    whole = path.read_bytes()
    head_bytes = gguf.GGUFReader(path).data_offset
    _load_all(path)
    _try_all(path, path, lambda source: _mutated(whole, source, head_bytes=head_bytes), num=300, least=120)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_bytes_of_a_folders_files(tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path / "model")
    whole = (folder / name).read_bytes()
    _try_all(folder, folder / name, lambda source: _mutated(whole, source, head_bytes=2000), num=100, least=20)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json",
     "model.safetensors.index.json"],
)  # fmt: skip
def test_strange_values_in_a_folders_files(tmp_path: Path, name: str) -> None:
    """Valid JSON that says something odd: another type, null, numbers out of any range."""
    folder = _folder(tmp_path / "model")
    whole = (folder / name).read_bytes()
    least = 0 if name == "special_tokens_map.json" else 8  # what it says, the tokenizer's config says again
    _try_all(folder, folder / name, lambda source: _json_mutated(whole, source), num=100, least=least)
