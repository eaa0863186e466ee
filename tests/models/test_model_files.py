"""The small files of a model: whatever is wrong with one is one line that names it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from headwater.models.fields import Fields
from headwater.models.model_files import ModelFileError, open_regular, read_json_if_there, read_json_object, read_text

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"


def _a_directory(path: Path) -> None:
    path.mkdir()


def _a_pipe(path: Path) -> None:
    os.mkfifo(path)


def _a_loop(path: Path) -> None:
    path.symlink_to(path)


def _a_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("none"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_a_directory, "is a directory, but a file is expected here"),
        (_a_pipe, "is no regular file"),
        (_a_loop, r"cannot be opened \(Too many levels of symbolic links\)"),
        (_a_link_to_nothing, r"cannot be opened \(No such file or directory\)"),
    ],
)
def test_what_is_no_file_is_refused_and_never_waited_for(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    """A pipe would hold the engine for ever; a link that leads nowhere is a lost file, not an optional one."""
    path = tmp_path / "config.json"
    make(path)
    for read in (open_regular, read_text, read_json_object, read_json_if_there):
        with pytest.raises(ModelFileError, match=rf"config\.json: {reason}"):
            read(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(ModelFileError, match=r"config\.json: cannot be opened \(Permission denied\)"):
        read_json_object(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (LFS, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark"),
        ('{"a": 1}'.encode("utf-16"), r"is no UTF-8 text \(byte 0\)"),
        (b'{"a": "\xff"}', r"is no UTF-8 text \(byte 7\)"),
        (b"[1]", "must hold a JSON object, found a list"),
        (b"null", "must hold a JSON object, found null"),
        (b'"text"', "must hold a JSON object, found a string"),
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_named_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"config\.json: {reason}") as caught:
        read_json_object(path)
    assert "\n" not in str(caught.value), "one line"


def test_null_is_the_same_as_nothing(tmp_path: Path) -> None:
    """`"rms_norm_eps": null` was a TypeError, `"add_bos_token": null` took the BOS away."""
    path = tmp_path / "config.json"
    path.write_text('{"a": null, "b": {"c": null, "d": 1}, "e": [null, 2]}')
    assert read_json_object(path) == {"b": {"d": 1}, "e": [None, 2]}
    assert read_json_if_there(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda it: it.integer("text"), "text must be an integer from 1 to .*, found 'five'"),
        (lambda it: it.integer("yes"), "yes must be an integer"),
        (lambda it: it.integer("half"), "half must be an integer"),
        (lambda it: it.integer("none"), "lacks the integer 'none'"),
        (lambda it: it.integer("five", high=4), "five must be an integer from 1 to 4, found 5"),
        (lambda it: it.number("text"), "text must be a number"),
        (lambda it: it.number("nan"), "nan must be a number, finite, found nan"),
        (lambda it: it.number("huge"), "huge must be a number"),
        (lambda it: it.number("half", low=1.0), "half must be a number, at least 1, found 0.5"),
        (lambda it: it.flag("five"), "five must be true or false, found 5"),
        (lambda it: it.text("five"), "five must be a string, found 5"),
        (lambda it: it.texts("text"), "text must be a list of strings"),
        (lambda it: it.inner("five"), "five must be an object, found 5"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused_by_name(read: Callable[[Fields], object], message: str) -> None:
    values = {"text": "five", "yes": True, "half": 0.5, "five": 5, "nan": float("nan"), "huge": 10**400}
    with pytest.raises(ModelFileError, match=f"config.json: {message}"):
        read(Fields(values, source="config.json"))


def test_values_come_back_and_defaults_are_for_what_is_absent() -> None:
    fields = Fields({"whole": 2.0, "yes": True, "inner": {"a": 1}}, source="config.json")
    assert fields.integer("whole") == 2 and fields.number("whole") == 2.0 and fields.flag("yes")
    assert fields.integer("none", 7) == 7 and fields.inner("inner").integer("a") == 1
    assert fields.texts("none") == [] and "yes" in fields and list(fields) == ["whole", "yes", "inner"]
