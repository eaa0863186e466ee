"""Folders of received buckets: whole files only, a bound, and nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.devices.safetensors_header import build_header
from headwater.transports.staging import BucketError, StagingArea, StagingFull


def bucket_of(*names: str) -> bytes:
    return build_header([(name, "F32", (2,)) for name in names]) + bytes(8 * len(names))


@pytest.fixture
def area(tmp_path: Path):
    area = StagingArea(tmp_path, max_bytes=4096)
    yield area
    area.close()
    assert list(tmp_path.glob("headwater*")) == []


def test_a_bucket_becomes_a_file_when_it_is_whole(area: StagingArea) -> None:
    folder = area.folder()
    data = bucket_of("a", "b")
    for names in (("a", "b"), ("c",)):
        bucket = folder.bucket()
        for byte in bucket_of(*names):
            bucket.write(bytes([byte]))
        assert not list(folder.path.glob(f"{len(names)}*.safetensors"))
        assert list(bucket.finish().tensors) == list(names)
    assert [path.name for path in sorted(folder.path.iterdir())] == ["000001.safetensors", "000002.safetensors"]
    assert (folder.path / "000001.safetensors").read_bytes() == data
    assert (folder.path.stat().st_mode & 0o777, folder.path.parent.stat().st_mode & 0o777) == (0o700, 0o700)


@pytest.mark.parametrize("cut", [1, 9, 20])
def test_a_torn_bucket_leaves_nothing(area: StagingArea, cut: int) -> None:
    folder = area.folder()
    bucket = folder.bucket()
    bucket.write(bucket_of("a")[:-cut])
    with pytest.raises(BucketError, match="whole safetensors"):
        bucket.finish()
    assert list(folder.path.iterdir()) == [] and area.num_bytes == 0


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\xff" * 40])
def test_what_is_no_bucket_is_refused(area: StagingArea, data: bytes) -> None:
    bucket = area.folder().bucket()
    bucket.write(data)
    with pytest.raises(BucketError):
        bucket.finish()


def test_the_area_is_bounded_over_all_folders(area: StagingArea) -> None:
    first = area.folder().bucket()
    first.write(bytes(3000))
    second = area.folder().bucket()
    with pytest.raises(StagingFull, match="--max-staged-weights-bytes"):
        second.write(bytes(2000))
    first.discard()
    second.write(bytes(2000))
    second.discard()


def test_folders_in_use_and_those_that_still_receive_are_kept(area: StagingArea) -> None:
    used, old, receiving = area.folder(), area.folder(), area.folder()
    used.is_complete = old.is_complete = True
    area.keep_only({str(used.path)})
    assert used.path.exists() and receiving.path.exists() and not old.path.exists()


def test_a_file_is_copied_whole(area: StagingArea, tmp_path: Path) -> None:
    source = tmp_path / "from-the-trainer.safetensors"
    source.write_bytes(bucket_of("a"))
    folder = area.folder()
    bucket = folder.bucket()
    bucket.copy_from(source)
    source.write_bytes(bytes(100))  # the trainer uses its buffer again
    assert list(bucket.finish().tensors) == ["a"]


def test_a_file_is_taken_by_its_name(area: StagingArea, tmp_path: Path) -> None:
    source = tmp_path / "from-the-trainer.safetensors"
    source.write_bytes(bucket_of("a"))
    inode = source.stat().st_ino
    folder = area.folder()
    bucket = folder.bucket()
    bucket.take(source)
    assert list(bucket.finish().tensors) == ["a"]
    assert not source.exists() and (folder.path / "000001.safetensors").stat().st_ino == inode
    assert area.num_bytes == len(bucket_of("a"))
    (tmp_path / "torn.safetensors").write_bytes(bucket_of("a")[:-1])
    bucket = folder.bucket()
    bucket.take(tmp_path / "torn.safetensors")
    with pytest.raises(BucketError):
        bucket.finish()
    assert area.num_bytes == len(bucket_of("a"))


def test_a_file_with_two_names_is_not_taken(area: StagingArea, tmp_path: Path) -> None:
    """Its other name could change what is in place."""
    (tmp_path / "a.safetensors").write_bytes(bucket_of("a"))
    (tmp_path / "b.safetensors").hardlink_to(tmp_path / "a.safetensors")
    bucket = area.folder().bucket()
    with pytest.raises(BucketError, match="one name"):
        bucket.take(tmp_path / "a.safetensors")
    bucket.discard()


@pytest.mark.parametrize("kind", ["missing", "pipe", "link", "folder"])
def test_only_a_regular_file_is_copied(area: StagingArea, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "folder":
        path.mkdir()
    bucket = area.folder().bucket()
    with pytest.raises(BucketError):
        bucket.copy_from(path)
    bucket.discard()


def test_only_folders_of_killed_servers_are_removed(area: StagingArea, tmp_path: Path) -> None:
    living = area.folder()
    code = (
        "import os, sys; from pathlib import Path; from headwater.transports.staging import StagingArea\n"
        "print(StagingArea(Path(sys.argv[1])).folder().path, flush=True); os._exit(9)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    dead = Path(run.stdout.strip())
    assert dead.exists()
    other = StagingArea(tmp_path)
    other.folder()
    assert living.path.exists() and not dead.exists()
    other.close()


def test_a_bucket_that_is_whole_after_the_end_of_its_transfer_leaves_nothing(area: StagingArea) -> None:
    """The engines may be reading the folder: a file more would be a part of no transfer."""
    folder = area.folder()
    bucket = folder.bucket()
    bucket.write(bucket_of("a"))
    folder.is_complete = True
    with pytest.raises(BucketError, match="the transfer ended"):
        bucket.finish()
    assert list(folder.path.iterdir()) == [] and area.num_bytes == 0
