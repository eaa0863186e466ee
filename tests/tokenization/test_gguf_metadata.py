"""Reading GGUF metadata without the `gguf` package's reader."""

import struct

import gguf
import pytest
from tiny_tokenizers import byte_level_metadata, write_gguf

from headwater.models.model_files import ModelFileError
from headwater.tokenization.gguf_tokenizer import read_gguf_metadata


def test_every_kind_of_value_comes_back_as_the_gguf_writer_wrote_it(tmp_path):
    """A wrong width or order of one value type would shift everything after it."""
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "grüße 😀")
    writer.add_array("texts", ["", "a", "日本"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    found = read_gguf_metadata(path)

    assert found == {
        "general.architecture": "llama",
        "u8": 200,
        "i8": -100,
        "u16": 60_000,
        "i16": -30_000,
        "u32": 4_000_000_000,
        "i32": -2_000_000_000,
        "u64": 2**63,
        "i64": -(2**62),
        "f32": 0.5,
        "f64": 0.1,
        "yes": True,
        "text": "grüße 😀",
        "texts": ["", "a", "日本"],
        "numbers": [1, -2, 3],
        "floats": [0.5, -1.5],
        "nested": [[1, 2], [3]],
    }


def test_a_file_cut_anywhere_in_its_metadata_is_a_clear_error(tmp_path):
    """A half downloaded model must not end in a traceback out of `struct`, nor in a shorter vocabulary."""
    whole = write_gguf(tmp_path / "whole.gguf", byte_level_metadata()).read_bytes()
    end_of_metadata = whole.index(b"zeros")
    cut = tmp_path / "cut.gguf"
    for size in [4, 5, 12, 23, *range(24, end_of_metadata - 8, 97)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: is a truncated or damaged GGUF file"):
            read_gguf_metadata(cut)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"GGU", "is no GGUF file"),
        (b"PK\x03\x04" + b"\0" * 64, "is no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    ],
    ids=["empty", "short", "zip", "lfs"],
)
def test_another_kind_of_file_is_named_as_such(tmp_path, content, reason):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"model\.gguf: {reason}"):
        read_gguf_metadata(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24], ids=["old", "future", "big-endian"])
def test_an_unknown_version_is_refused(tmp_path, version):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    with pytest.raises(ValueError, match=f"is GGUF version {version}, known versions: 2, 3"):
        read_gguf_metadata(path)


@pytest.mark.parametrize("item_type", [5, 8, 9], ids=["numbers", "strings", "arrays"])
def test_a_damaged_count_does_not_make_the_server_allocate_it(tmp_path, item_type):
    """2**60 entries announced in a file of 100 bytes: an error, not an attempt to hold them."""
    path = tmp_path / "model.gguf"
    entry = struct.pack("<Q1sIIQ", 1, b"k", 9, item_type, 2**60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + b"\xff" * 40)
    with pytest.raises(ValueError, match=r"is damaged: it announces 1152921504606846976 items"):
        read_gguf_metadata(path)
