"""The GGUF header reader against the gguf package's writer."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from headwater.models.gguf_file import GGUFFile
from headwater.models.model_files import ModelFileError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_float32("llama.rope.freq_base", 10000.5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("tokenizer.chat_template", "{{ ünïcode }}")
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ä€", "b" * 300])
    writer.add_array("long", list(range(3000)))
    writer.add_array("short", [1.5, -2.5])
    writer.add_uint64("last", 2**40)
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(64, dtype=np.float16).reshape(4, 16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_scalars_strings_and_arrays(written: Path) -> None:
    """A wrong skip over an array would shift everything behind it."""
    file = GGUFFile(written)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 7
    assert file.metadata["llama.rope.freq_base"] == 10000.5
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    assert file.metadata["tokenizer.chat_template"] == "{{ ünïcode }}"
    assert file.metadata["last"] == 2**40
    assert file.array("tokenizer.ggml.tokens") == ["a", "", "ä€", "b" * 300]
    assert file.array("long") == list(range(3000))
    assert file.array("short") == file.metadata["short"] == [1.5, -2.5]
    assert [file.array_length(key) for key in ("tokenizer.ggml.tokens", "long", "short")] == [4, 3000, 2]


def test_tensors_lie_where_the_header_says(written: Path) -> None:
    file = GGUFFile(written)
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {"one": (2, 3), "two": (4, 16)}
    one, two = (file.load(tensor) for tensor in file.tensors.values())
    assert (one.format, one.data.tolist()) == ("float32", [[0, 1, 2], [3, 4, 5]])
    assert (two.format, two.shape, two.data.flatten().tolist()) == ("float16", (4, 16), list(range(64)))


def test_what_is_no_gguf_file_is_refused(tmp_path: Path, written: Path) -> None:
    """A download cut short must be named as such, not fail later as a strange tensor."""
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    with pytest.raises(ValueError, match="does not begin with 'GGUF'"):
        GGUFFile(other)
    content = written.read_bytes()
    for length in (20, 200, len(content) - 4):
        other.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated"):
            GGUFFile(other)
    other.write_bytes(content[:4] + (9).to_bytes(4, "little") + content[8:])
    with pytest.raises(ValueError, match="version 9"):
        GGUFFile(other)
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        GGUFFile(other)


def test_a_file_cut_off_while_it_is_open_is_an_error_and_no_crash(tmp_path: Path):
    """Reading the tensor from a mapping would end the process with SIGBUS."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.ones((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.load(file.tensors["w"]).data.sum() == 64 * 64
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ModelFileError, match="is cut off"):
        file.load(file.tensors["w"])


def test_tensors_of_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    """Integers are no weights, and blocks that nothing dequantises would fail in the midst of a start."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("i", np.ones((2, 8), dtype=np.int8))
    writer.add_tensor("q", np.zeros((2, 40), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    for name, kind in (("i", "I8"), ("q", "Q8_1")):
        with pytest.raises(ModelFileError, match=rf"x\.gguf: tensor '{name}' is of type {kind}, which is not read"):
            file.load(file.tensors[name])
