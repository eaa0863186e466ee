"""What the receiving processes write: safetensors files of tensors that lie on a GPU (here: in host memory)."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save

from headwater.devices.gpu_note import FILLING, FREED, GpuNote, read_note, write_note
from headwater.launch.receiving import device_copies, tensors
from headwater.launch.receiving.device_copies import FileWriter
from headwater.messages.receiving import CopyFromGpu, ReceiveBucket
from headwater.transports.staging import StagingArea

pytestmark = pytest.mark.slow
NAMES = ("matrix", "vector", "byte", "none")
SENT = (torch.arange(70, dtype=torch.bfloat16).reshape(10, 7), torch.randn(5), torch.ones(3).char(), torch.empty(0, 4))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Any]]:
    """Handles are the numbers of tensors here."""
    seen: list[Sequence[Any]] = []

    def open_handle(arguments: Sequence[Any]) -> torch.Tensor:
        seen.append(arguments)
        return FLAT if arguments[0] == "flat" else SENT[arguments[0]]

    monkeypatch.setattr(tensors, "open_shared", open_handle)
    return seen


FLAT = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in SENT])


def call(path: Path, *, handles: Sequence[Any], first_bytes: Sequence[int | None]) -> CopyFromGpu:
    path.touch()
    return CopyFromGpu(
        names=NAMES,
        dtypes=("BF16", "F32", "I8", "F32"),
        shapes=tuple(tuple(tensor.shape) for tensor in SENT),
        handles=tuple((handle,) for handle in handles),
        first_bytes=tuple(first_bytes),
        path=str(path),
    )


def test_tensors_and_parts_of_a_flattened_bucket_arrive_as_they_are(
    opened: list[Sequence[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_copies, "CHUNK_BYTES", 16)  # pieces that end within a number
    writer = FileWriter(3)
    tensors.copy_from_gpu(call(tmp_path / "each", handles=range(4), first_bytes=[None] * 4), writer)
    assert len(opened) == 4
    tensors.copy_from_gpu(call(tmp_path / "flat", handles=["flat"] * 4, first_bytes=[0, 140, 160, 163]), writer)
    assert len(opened) == 5, "one handle is opened once"
    for name in ("each", "flat"):
        os.rename(tmp_path / name, tmp_path / f"{name}.safetensors")
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in zip(NAMES, SENT, strict=True))


def test_a_tensor_that_is_not_what_was_announced_is_an_error(opened: list[Sequence[Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="were announced"):
        tensors.copy_from_gpu(call(tmp_path / "x", handles=[0, 0, 2, 3], first_bytes=[None] * 4), FileWriter(1))


def test_a_full_file_system_is_an_error_and_no_signal(
    opened: list[Sequence[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.statvfs(tmp_path)
    full = os.statvfs_result([0 if at == 4 else value for at, value in enumerate(found)])
    assert full.f_bavail == 0
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: full)
    with pytest.raises(OSError, match="No space"):
        tensors.copy_from_gpu(call(tmp_path / "x", handles=range(4), first_bytes=[None] * 4), FileWriter(2))


def test_a_bucket_that_stays_on_the_gpu_is_noted_and_its_file_filled_behind(
    opened: list[Sequence[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the note, then the file; the memory is freed last, which the note says before."""
    shared: list[torch.Tensor] = []
    monkeypatch.setattr(device_copies, "free_bytes", lambda pieces: 1000)
    monkeypatch.setattr(device_copies, "share", lambda flat: (shared.append(flat), ("handle", b"\0\xff", [1]))[1])
    held, filled = threading.Event(), FileWriter(2)
    right = filled._copy
    monkeypatch.setattr(filled, "_copy", lambda *args: (held.wait(30), right(*args)))
    asked = call(tmp_path / "x.part", handles=range(4), first_bytes=[None] * 4)
    asked = msgspec.structs.replace(asked, spare_bytes=1000 - FLAT.nbytes)
    tensors.copy_from_gpu(asked, filled)
    note = read_note(tmp_path / "x.part")
    assert note == GpuNote(FILLING, ("handle", b"\0\xff", (1,)))
    assert torch.equal(shared[0], FLAT)
    held.set()
    filled.drop_held()
    assert read_note(tmp_path / "x.part") == GpuNote(FREED, note.handle)
    os.rename(tmp_path / "x.part", tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in zip(NAMES, SENT, strict=True))
    filled.drop_held()  # harmless


@pytest.mark.parametrize("spare_bytes", [-1, 1001 - FLAT.nbytes])
def test_a_bucket_leaves_the_gpu_at_once_where_the_engine_needs_its_memory(
    opened: list[Sequence[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare_bytes: int
) -> None:
    monkeypatch.setattr(device_copies, "free_bytes", lambda pieces: 1000)
    asked = call(tmp_path / "x", handles=range(4), first_bytes=[None] * 4)
    tensors.copy_from_gpu(msgspec.structs.replace(asked, spare_bytes=spare_bytes), FileWriter(2))
    assert read_note(tmp_path / "x") is None
    os.rename(tmp_path / "x", tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["matrix"], SENT[0])


def test_notes_follow_their_buckets(tmp_path: Path) -> None:
    """A file without its note would count as whole."""
    area = StagingArea(tmp_path)
    folder = area.folder()
    for is_kept in (True, False):
        bucket = folder.bucket()
        bucket.path.write_bytes(save({"weight": torch.ones(1)}))
        bucket.written_elsewhere()
        os.close(write_note(bucket.path, ("handle",)))
        if is_kept:
            bucket.finish()
        else:
            bucket.discard()
    assert sorted(path.name for path in folder.path.iterdir()) == ["000001.gpu", "000001.safetensors"]
    area.close()


def test_packed_tensors_come_in_pieces_that_end_over_the_size() -> None:
    """As vLLM's trainers cut them: a tensor is never split, and one of the very size does not end its piece."""
    bucket = ReceiveBucket(
        names=tuple("abcde"), dtypes=("F32", "BF16", "F32", "F32", "F32"), shapes=((2,), (4,), (3,), (), (9,)),
        is_flattened=True, path="", piece_bytes=16,
    )  # fmt: skip
    whole = tensors._Bucket(bucket.names, bucket.dtypes, bucket.shapes, path="")
    assert [len(piece) for piece in whole.pieces(tensors._piece_sizes(bucket))] == [8 + 8 + 12, 4 + 36]
    assert tensors._piece_sizes(msgspec.structs.replace(bucket, piece_bytes=0)) == [8 + 8 + 12 + 4 + 36]
    assert tensors._piece_sizes(msgspec.structs.replace(bucket, piece_bytes=1)) == [8, 8, 12, 4, 36]


@pytest.mark.parametrize(("num_old_bytes", "num_made"), [(0, 4140), (100, 4040), (4140, None), (9000, None)])
def test_a_bucket_in_host_memory_is_written_over_the_pages_that_its_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_old_bytes: int, num_made: int | None
) -> None:
    made: list[int] = []
    fallocate = os.posix_fallocate

    def noted(descriptor: int, at: int, num_bytes: int) -> None:
        made.append(num_bytes)
        fallocate(descriptor, at, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", noted)
    path = tmp_path / "bucket.safetensors"
    path.write_bytes(b"o" * num_old_bytes)
    bucket = tensors._Bucket(("a", "b"), ("F32", "F32"), ((1000,), (3,)), path=str(path))
    for tensor, value in zip(bucket.tensors(), (1.0, 2.0), strict=True):
        tensor.fill_(value)
    found = load_file(path)
    assert torch.equal(found["a"], torch.ones(1000)) and torch.equal(found["b"], torch.full((3,), 2.0))
    assert path.stat().st_size == 4012 + 128, "the numbers and their header, and nothing of the old bytes"
    assert made == ([] if num_made is None else [num_made])
