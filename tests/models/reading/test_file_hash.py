"""The hash of files: every byte counts, and large files have the same one for any number of threads."""

from pathlib import Path

import pytest

from headwater.models.reading import file_hash
from headwater.models.reading.file_hash import hash_of


@pytest.mark.parametrize("is_large", [False, True])
def test_every_byte_counts(tmp_path: Path, is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_large:
        monkeypatch.setattr(file_hash, "LARGE_BYTES", 100)
        monkeypatch.setattr(file_hash, "_PIECE_BYTES", 64)
    paths = [tmp_path / name for name in ("one", "two")]
    paths[0].write_bytes(bytes(range(150)))
    paths[1].write_bytes(bytes(70))
    before = hash_of(["part"], paths)
    assert before == hash_of(["part"], paths, num_threads=4)
    found = {before, hash_of(["other"], paths), hash_of(["part"], paths[::-1])}
    for at in (0, 63, 64, 149):
        changed = bytearray(range(150))
        changed[at] ^= 1
        paths[0].write_bytes(changed)
        found.add(hash_of(["part"], paths, num_threads=2))
    assert len(found) == 7
