"""Reads the small files of a model. Every fault of a file is a ModelFileError, which names the file."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_JSON_BYTES = 1 << 28  # the largest tokenizer.json in use has some 33 MB


class ModelFileError(ValueError):
    """A file of a model that cannot be used. The message is one line: `<path>: <reason>`."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {' '.join(reason.split())}")


def is_there(path: Path) -> bool:
    """Whether the folder has an entry of this name, of any kind. A dangling link is an error, not an absence."""
    return os.path.lexists(path)


def open_regular(path: Path) -> BinaryIO:
    """Open a file of a model for reading. ModelFileError unless it is a readable regular file that is not empty.

    Never waits: pipes and devices are refused before anything is read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"cannot be opened ({_words(error)})") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ModelFileError(path, f"is {kind}, but a file is expected here")
        if status.st_size == 0:
            raise ModelFileError(path, "is empty")
        file = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    _refuse_lfs_pointer(path, file)
    return file


def read_into(file: BinaryIO, path: Path, buffer: memoryview, *, offset: int, what: str = "") -> None:
    """Fill `buffer` from `offset` on. ModelFileError if the file cannot be read or is too short; `what` names the part.

    The system call runs without Python's lock: a network mount that hangs stops this thread alone. (A mapping would
    hang with the lock held, and end the process when another cuts the file off.)
    """
    at = 0
    while at < len(buffer):
        try:
            num_read = os.preadv(file.fileno(), [buffer[at:]], offset + at)
        except OSError as error:
            raise ModelFileError(path, f"{what}cannot be read ({_words(error)})") from None
        if num_read == 0:
            raise ModelFileError(path, f"{what}is cut off: the file ends at byte {offset + at}")
        at += num_read


def read_bytes(path: Path, *, most_bytes: int = _MOST_JSON_BYTES) -> bytes:
    """All of a small file. ModelFileError if it cannot be read or is implausibly large."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise ModelFileError(path, f"has {size} bytes, at most {most_bytes} are read")
        try:
            return file.read()
        except OSError as error:
            raise ModelFileError(path, f"cannot be read ({_words(error)})") from None


def read_text(path: Path) -> str:
    """A small file's text. ModelFileError if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(path, f"is no UTF-8 text (byte {error.start})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, without members that are null, which mean the same as absent ones."""
    text = read_text(path)
    if text.startswith("\ufeff"):
        raise ModelFileError(path, "begins with a byte order mark, which JSON does not allow; save it without")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ModelFileError(path, f"is not valid JSON ({error})") from None
    except RecursionError:
        raise ModelFileError(path, "is nested too deeply") from None
    if not isinstance(content, dict):
        raise ModelFileError(path, f"must hold a JSON object, found {_kind(content)}")
    return without_nulls(content)


def read_json_if_there(path: Path) -> dict[str, Any]:
    """`read_json_object`; an empty object if there is no such file."""
    return read_json_object(path) if is_there(path) else {}


def without_nulls(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object, and the objects in it, without members that are null."""
    return {
        key: without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in content.items()
        if value is not None
    }


def _refuse_lfs_pointer(path: Path, file: BinaryIO) -> None:
    try:
        head = file.read(len(_LFS_POINTER))
        file.seek(0)
    except OSError as error:
        file.close()
        raise ModelFileError(path, f"cannot be read ({_words(error)})") from None
    if head == _LFS_POINTER:
        file.close()
        raise ModelFileError(path, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]
