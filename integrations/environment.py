"""An environment of its own for each client: a virtual environment or a folder for npm, outside the repository.

`HEADWATER_INTEGRATIONS_CACHE` names the folder that holds them; ~/.cache/headwater-integrations by default. An
environment is made once and made again when its packages change.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from clients import Client

INSTALL_LIMIT_S = 1800.0
CACHE_VARIABLE = "HEADWATER_INTEGRATIONS_CACHE"


class InstallError(Exception):
    """The client's packages could not be installed."""


def cache_folder() -> Path:
    default = Path.home() / ".cache" / "headwater-integrations"
    return Path(os.environ.get(CACHE_VARIABLE, default))


class Environment:
    """The folder of one client, with its packages. `python` runs the client's script.

    With `is_here` it is the environment that runs this, as it is: for clients that the project's tests install.
    """

    def __init__(self, client: Client, *, is_here: bool = False) -> None:
        self._client = client
        self._is_here = is_here
        self.folder = cache_folder() / (client.environment or client.name)
        self._stamp = self.folder / "installed.txt"

    @property
    def python(self) -> Path:
        """The interpreter of the client's scripts; for npm's clients, the one that runs this."""
        return Path(sys.executable) if self._client.npm or self._is_here else self.folder / "venv" / "bin" / "python"

    def install(self) -> None:
        """Install what is missing. Raises InstallError with the last lines of pip or npm."""
        wanted = "\n".join((*self._client.packages, *self._client.alone, *self._client.npm))
        if self._is_here or (self._stamp.exists() and self._stamp.read_text() == wanted):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self._client.npm:
            self._run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(self.folder), *self._client.npm)
        else:
            self._run(sys.executable, "-m", "venv", "--without-pip", str(self.folder / "venv"))
            self._pip(*self._client.packages)
            if self._client.alone:
                self._pip("--no-deps", *self._client.alone)
        self._stamp.write_text(wanted)

    def versions(self) -> dict[str, str]:
        """The installed version of each package that the client names, its main one first."""
        if self._client.npm:
            return dict(package.rsplit("@", 1) for package in self._client.npm)
        names = [name_of(package) for package in (*self._client.alone, *self._client.packages)]
        code = "import sys; from importlib.metadata import version\nfor name in sys.argv[1:]: print(version(name))"
        found = subprocess.run([self.python, "-c", code, *names], capture_output=True, text=True, check=True)
        return dict(zip(names, found.stdout.split(), strict=True))

    def _pip(self, *arguments: str) -> None:
        flags = ("--disable-pip-version-check", "--quiet", "--no-compile")
        self._run(sys.executable, "-m", "pip", "--python", str(self.python), "install", *flags, *arguments)

    def _run(self, *command: str) -> None:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
        if ran.returncode != 0:
            last = "\n".join((ran.stdout + ran.stderr).splitlines()[-8:])
            raise InstallError(f"{' '.join(command[:4])} ...: {last}")


def name_of(requirement: str) -> str:
    """`evalscope[perf]==1.14.1` is `evalscope`."""
    return requirement.partition("==")[0].partition("[")[0]
