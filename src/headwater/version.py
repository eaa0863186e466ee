"""Which version this is: of the installed package, or of the source tree that runs without being installed."""

import tomllib
from functools import cache
from pathlib import Path

UNKNOWN = "0+unknown"  # sources without a pyproject.toml above them


@cache
def version() -> str:
    """The version as a text; from a source tree that of its pyproject.toml, marked as such."""
    from importlib.metadata import PackageNotFoundError  # slow to import, and most commands need no version
    from importlib.metadata import version as installed

    try:
        return installed("headwater")
    except PackageNotFoundError:
        return source_version(Path(__file__).parents[2] / "pyproject.toml")


def source_version(pyproject: Path) -> str:
    """What a source tree's pyproject.toml says; `UNKNOWN` if it is not there, or is another project's."""
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        return f"{project['version']}+source" if project["name"] == "headwater" else UNKNOWN
    except (OSError, ValueError, LookupError, TypeError):
        return UNKNOWN
