"""What the receiving processes write: safetensors files of tensors that lie on a GPU (here: in host memory)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater.launch.receiving import device_copies, tensors
from headwater.launch.receiving.device_copies import FileWriter
from headwater.messages.receiving import CopyFromGpu

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

    monkeypatch.setattr(tensors, "_open", open_handle)
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
