"""Opening a store by name: what a user can mistype must be told before the server runs."""

import pytest

from headwater.storage.errors import StorageUnavailable
from headwater.storage.registry import open_backend


@pytest.mark.parametrize("kind", ["memory", "file", "redis"])
def test_each_kind_opens(tmp_path, kind):
    options = {"file": {"directory": tmp_path}, "redis": {"url": "redis://127.0.0.1:1/0"}}.get(kind, {})
    backend = open_backend(kind, **options)
    assert backend.kind == kind
    backend.close()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("s3", {}, "must be one of file, redis, memory, found 's3'"),
        ("file", {}, "needs a storage directory"),
        ("file", {"directory": "d", "url": "redis://h"}, "storage url is for the redis backend"),
        ("redis", {}, "needs a storage url"),
        ("redis", {"url": "redis://h", "directory": "d"}, "storage directory is for the file backend"),
        ("redis", {"url": "http://h"}, "must be redis://"),
        ("redis", {"url": "redis://h?socket_timeout=abc"}, "socket_timeout"),
        ("redis", {"url": "redis://h?colour=blue"}, "colour"),
        ("redis", {"url": "redis://h:notaport/0"}, "storage url"),
        ("redis", {"url": "redis://h", "ttl_s": 0}, "ttl_s must be at least 1"),
        ("redis", {"url": "redis://h", "timeout_s": 0.0}, "timeout_s must be positive"),
        ("memory", {"capacity_bytes": 0}, "storage size must be at least 1 byte, found 0"),
        ("file", {"directory": "d", "capacity_bytes": -5}, "storage size must be at least 1 byte"),
    ],
)
def test_mistakes_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        open_backend(kind, **options)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageUnavailable, match="file"):
        open_backend("file", directory=tmp_path / "file" / "store")


def test_a_password_stays_out_of_errors():
    """Errors end up in logs."""
    with pytest.raises(ValueError) as caught:
        open_backend("redis", url="redis://:hunter2@h?colour=blue")
    assert "hunter2" not in str(caught.value)
