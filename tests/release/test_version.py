"""The version, also where no package is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

import headwater
from headwater.version import UNKNOWN, source_version, version

SOURCE = Path(headwater.__file__).parents[1]


def test_a_source_tree_knows_its_version() -> None:
    pyproject = SOURCE.parent / "pyproject.toml"
    assert source_version(pyproject).endswith("+source")
    assert version().removesuffix("+source") == source_version(pyproject).removesuffix("+source")


@pytest.mark.parametrize("content", [None, "", "[project]\nname = 'other'\nversion = '3'\n", "= broken", "project = 5"])
def test_what_is_not_known_is_no_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "pyproject.toml"
    if content is not None:
        path.write_text(content)
    assert source_version(path) == UNKNOWN


@pytest.mark.slow
def test_commands_run_from_a_source_tree_without_package_metadata() -> None:
    """`serve` ended with a PackageNotFoundError before it had said a word."""
    program = (
        "import importlib.metadata, sys\n"
        "installed = importlib.metadata.version\n"
        "def of_others(name):\n"
        "    if name == 'headwater': raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return installed(name)\n"
        "importlib.metadata.version = of_others\n"
        "import headwater.http_api.app, headwater.server.banner\n"
        "from headwater.cli.main import main\n"
        "sys.argv = ['headwater', 'version']\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert "+source" in ended.stdout
