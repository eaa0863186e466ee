"""Our reader of .safetensors files, against the package's own, and on files that are none."""

import json
import os
import struct
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from headwater.devices.cuda.torch_tensors import dtype_name  # noqa: E402
from headwater.models.safetensors_file import FORMATS, SafetensorsFile  # noqa: E402


def test_every_dtype_and_shape_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = {}
    for index, (name, form) in enumerate(FORMATS.items()):
        for shape in ((), (0,), (3,), (2, 0, 4), (5, 7)):
            tensor = (torch.arange(1 + 5 * 7 * index, 1 + 5 * 7 * index + 35) % 2).to(getattr(torch, form))
            made[f"{name} {shape}"] = tensor[: torch.Size(shape).numel()].reshape(shape).clone()
    save_file(made, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.tensors.keys() == made.keys()
    for name, tensor in made.items():
        found = file.load(name)
        assert (found.format, found.shape) == (dtype_name(tensor.dtype), tensor.shape)
        assert (found.to_float32() == tensor.float().numpy()).all()


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        (entry(), b"1234567", None, "ends behind the end of the file"),
        (entry(data_offsets=[0, 4]), bytes(8), None, "does not fill its 4 bytes"),
        (entry(data_offsets=[4, 12]), bytes(12), None, "'w' does not begin where the one before it ends"),
        (entry() | {"v": entry(data_offsets=[4, 12])["w"]}, bytes(12), None, "'v' does not begin where"),
        (entry(), bytes(9), None, "1 bytes at its end belong to no tensor"),
        (entry(data_offsets=[8, 0]), bytes(8), None, "does not fill its -8 bytes"),
        (entry(data_offsets=[0]), bytes(8), None, "not enough values"),
        (entry(shape=[1 << 60]), bytes(8), None, "does not fill"),
        (entry(shape=[-2]), bytes(8), None, "no number"),
        (entry(shape=["2"]), bytes(8), None, "no number"),
        (entry(dtype="F13"), bytes(8), None, "unknown dtype 'F13'"),
        ({"w": None}, bytes(8), None, "NoneType"),
        ([], bytes(8), None, "no JSON object"),
        (b"{", b"", None, "JSONDecodeError"),
        (b"\xff\xfe{}", b"", None, "Unicode"),
        (b"[" * 100_000, b"", None, "RecursionError"),
        ({}, b"", 1 << 62, "its header would have"),
        (b"", b"", 3, "its header would have 3 bytes"),
    ],
)
def test_damage_is_told_in_one_line_with_the_path(
    header: object, data: bytes, length: int | None, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", header, data, length=length)
    with pytest.raises(ValueError, match=r"model\.safetensors: is no whole safetensors file") as caught:
        SafetensorsFile(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_short_while_it_is_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """A mapped file would end the process with SIGBUS."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1 << 16)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match="tensor 'w' is cut off: the file ends at byte 5000"):
        file.load("w")


def test_a_file_replaced_under_its_name_does_not_mix_in(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"v": torch.zeros(4), "w": torch.zeros(4)}, path)
    file = SafetensorsFile(path)
    save_file({"v": torch.ones(4), "w": torch.ones(4)}, tmp_path / "new")
    (tmp_path / "new").rename(path)
    assert file.load("w").data.sum() == 0


@pytest.mark.parametrize(("make", "words"), [(os.mkfifo, "is no regular file"), (os.mkdir, "is a directory")])
def test_only_regular_files_are_opened(make, words: str, tmp_path: Path) -> None:
    make(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        SafetensorsFile(tmp_path / "model.safetensors")
