"""A server that is given a damaged model: exit code 2 and one line with the file and the reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from running_server import RunningServer
from tiered import write_byte_tokenizer

pytestmark = pytest.mark.slow

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def _lfs_weights(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(LFS)


def _a_pipe_for_a_config(folder: Path) -> None:
    os.mkfifo(folder / "config.json")


def _a_damaged_tokenizer(folder: Path) -> None:
    """With weights that are made up: the process that serves HTTP is the one that reads it whole."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}}}')


@pytest.mark.parametrize(
    ("make", "arguments", "line"),
    [
        (_lfs_weights, (), "model.safetensors: is a Git LFS pointer, not the file itself; fetch it with"),
        (_a_pipe_for_a_config, (), "config.json: is no regular file, but a file is expected here"),
        (_a_damaged_tokenizer, ("--load-format", "dummy"), "tokenizer.json: is no tokenizer ("),
    ],
)
def test_a_damaged_file_ends_the_start_with_one_line(
    tmp_path: Path, make: Callable[[Path], None], arguments: tuple[str, ...], line: str
) -> None:
    write_byte_tokenizer(tmp_path)  # without any, the server imports transformers, which takes seconds
    make(tmp_path)
    options = ("--dtype", "float32", "--max-total-tokens", "100", "--log-level", "warning", *arguments)
    with RunningServer("--model", str(tmp_path), *options) as server:
        assert server.process.wait(timeout=240) == 2, server.log
        told = [each for each in server.log.splitlines() if each.strip()]
    assert len(told) == 1 and told[0].startswith(f"error: {tmp_path}/{line}"), told
