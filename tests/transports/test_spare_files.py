"""The memory of replaced weights is written over by the next update, and never while somebody reads it."""

import fcntl
import mmap
import os
import signal
from pathlib import Path

import pytest

from headwater.devices.safetensors_header import build_header
from headwater.transports.staging import BucketError, StagedFolder, StagingArea, StagingFull

MIB = 1 << 20


def bucket_of(num_bytes: int, fill: bytes) -> bytes:
    return build_header([("a", "U8", (num_bytes,))]) + fill * num_bytes


OLD, SAME, SHORTER = bucket_of(3 * MIB, b"o"), bucket_of(3 * MIB, b"n"), bucket_of(2 * MIB + 5, b"s")


@pytest.fixture
def area(tmp_path: Path):
    area = StagingArea(tmp_path, max_bytes=20 * MIB)
    yield area
    area.close()
    assert list(tmp_path.glob("headwater*")) == []


def staged(area: StagingArea, data: bytes, *, folder: StagedFolder | None = None) -> Path:
    folder = folder or area.folder()
    bucket = folder.bucket()
    bucket.reserve(len(data))
    bucket.write(data[:1000])
    bucket.write(data[1000:])
    bucket.finish()
    return max(folder.path.iterdir())


def replace_all_but(area: StagingArea, newest: Path) -> None:
    for path in list(newest.parent.parent.iterdir()):
        if path.name.isdigit():
            area._folders[str(path)].is_complete = True
    area.keep_only({str(newest.parent)})


def replaced(area: StagingArea) -> tuple[Path, int]:
    """The file in place and the inode of the one before it, which is spare."""
    inode = staged(area, OLD).stat().st_ino
    newest = staged(area, SAME)
    replace_all_but(area, newest)
    assert (area.num_bytes, area.spare_bytes) == (len(SAME), len(OLD))
    return newest, inode


@pytest.mark.parametrize("data", [SAME, SHORTER], ids=["same size", "shorter"])
def test_a_bucket_is_written_over_the_weights_before_last(area: StagingArea, data: bytes) -> None:
    newest, inode = replaced(area)
    path = staged(area, data)
    assert path.stat().st_ino == inode
    assert path.read_bytes() == data, "nothing of the old bytes is left behind"
    assert newest.read_bytes() == SAME
    assert (area.num_bytes, area.spare_bytes) == (len(SAME) + len(data), 0)


def test_a_larger_bucket_goes_on_behind_the_old_pages(area: StagingArea) -> None:
    _, inode = replaced(area)
    data = bucket_of(7 * MIB, b"l")
    path = staged(area, data)
    assert path.stat().st_ino == inode and path.read_bytes() == data


def test_a_much_smaller_bucket_does_not_hold_a_large_file(area: StagingArea) -> None:
    _, inode = replaced(area)
    assert staged(area, bucket_of(100, b"x")).stat().st_ino != inode
    assert area.spare_bytes == len(OLD)


@pytest.mark.parametrize("how", ["open", "mapped", "another name"])
def test_a_file_that_somebody_reads_is_not_written_over(area: StagingArea, tmp_path: Path, how: str) -> None:
    """An engine that is slow, or one that is starting, reads whole old weights or gets an error."""
    old = staged(area, OLD)
    inode, reader, mapping = old.stat().st_ino, os.open(old, os.O_RDONLY), None
    if how == "mapped":
        mapping = mmap.mmap(reader, len(OLD), prot=mmap.PROT_READ)
    elif how == "another name":
        (tmp_path / "name").hardlink_to(old)
    if how != "open":
        os.close(reader)
    newest = staged(area, SAME)
    replace_all_but(area, newest)
    assert area.spare_bytes == 0 and not old.exists()
    assert staged(area, SAME).stat().st_ino != inode
    if how == "open":
        assert os.pread(reader, len(OLD), 0) == OLD
        os.close(reader)
    elif mapping is not None:
        assert mapping[:] == OLD
    else:
        assert (tmp_path / "name").read_bytes() == OLD


def test_a_process_that_opens_a_file_while_it_is_looked_at_does_not_end_this_one(
    area: StagingArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel sends a signal to the holder of a lease, and the usual one ends a process that does not expect it."""
    seen: list[int] = []
    before = signal.signal(signal.SIGIO, lambda number, frame: seen.append(number))
    real, opened = fcntl.fcntl, []

    def disturbed(descriptor: int, command: int, argument: int) -> int:
        result = real(descriptor, command, argument)
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_WRLCK):
            with pytest.raises(BlockingIOError):
                os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK)
            opened.append(descriptor)
        return result

    monkeypatch.setattr(fcntl, "fcntl", disturbed)
    try:
        replaced(area)
    finally:
        signal.signal(signal.SIGIO, before)
    assert opened and not seen


def test_a_file_with_holes_is_no_spare_one(area: StagingArea) -> None:
    """Its pages would have to be made by a write to mapped memory, which may find the file system full."""
    folder = area.folder()
    bucket = folder.bucket()
    header = build_header([("a", "U8", (2 * MIB,))])
    bucket.path.write_bytes(header)
    os.truncate(bucket.path, len(header) + 2 * MIB)
    bucket.written_elsewhere()
    bucket.finish()
    newest = staged(area, SAME)
    replace_all_but(area, newest)
    assert area.spare_bytes == 0


def test_spare_files_are_freed_before_a_bucket_is_refused(area: StagingArea) -> None:
    replaced(area)
    staged(area, bucket_of(15 * MIB, b"x"), folder=area.folder())
    assert area.spare_bytes == 0
    with pytest.raises(StagingFull):
        area.folder().bucket().reserve(3 * MIB)


def test_not_more_is_kept_than_is_in_place(area: StagingArea) -> None:
    folder = area.folder()
    for fill in (b"1", b"2", b"3"):
        staged(area, bucket_of(3 * MIB, fill), folder=folder)
    newest = staged(area, SAME)
    replace_all_but(area, newest)
    assert 0 < area.spare_bytes <= area.num_bytes
    area.free_spare()
    assert area.spare_bytes == 0


def test_a_torn_bucket_over_old_pages_is_refused(area: StagingArea) -> None:
    """The old bytes behind its end must not make it whole."""
    replaced(area)
    bucket = area.folder().bucket()
    bucket.reserve(len(SAME))
    bucket.write(SAME[:-1000])
    with pytest.raises(BucketError, match="whole safetensors"):
        bucket.finish()
    assert area.num_bytes == len(SAME)


@pytest.mark.parametrize("is_spare", [False, True])
def test_bytes_of_a_pipe_are_appended(area: StagingArea, is_spare: bool) -> None:
    if is_spare:
        replaced(area)
    bucket = area.folder().bucket()
    bucket.reserve(len(SAME))
    bucket.write(SAME[:10])
    source, target = os.pipe()
    for at in range(10, len(SAME), 60_000):
        piece = SAME[at : at + 60_000]
        os.write(target, piece)
        bucket.splice_from(source, len(piece))
    os.close(source)
    os.close(target)
    path = bucket.path
    bucket.finish()
    (staged_file,) = path.parent.iterdir()
    assert staged_file.read_bytes() == SAME


def test_bytes_of_a_pipe_are_bounded_like_others(area: StagingArea) -> None:
    bucket = area.folder().bucket()
    with pytest.raises(StagingFull, match="--max-staged-weights-bytes"):
        bucket.splice_from(-1, 21 * MIB)
    bucket.discard()
