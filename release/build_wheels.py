"""Build into dist/ what a release publishes: wheels with the CPU kernels, a wheel without them, and the sources.

    make wheel                                       # all platforms
    ARGS="--platform manylinux_2_17_x86_64" make wheel

A wheel holds a library for each instruction set of its platform. zig's clang compiles them all on any machine. The
libraries are loaded with ctypes, so a wheel serves every Python. On a platform without a wheel of its own, pip takes
the one without libraries, and the server compiles the kernels at its first start. The same sources give the same
wheels. Intel Macs have no wheel: the server does not know which instructions they have.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, PACKAGED, compile_library, library_name  # noqa: E402

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src")
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", PACKAGED.name)
NO_DEBUG_INFO = ("-g0", "-s")


@dataclass(frozen=True)
class Platform:
    """Where a wheel runs, as pip, zig and Python name it."""

    tag: str
    target: str
    machine: str
    suffix: str = ".so"


PLATFORMS = (
    Platform("manylinux_2_17_x86_64", target="x86_64-linux-gnu.2.17", machine="x86_64"),
    Platform("manylinux_2_17_aarch64", target="aarch64-linux-gnu.2.17", machine="aarch64"),
    Platform("macosx_11_0_arm64", target="aarch64-macos.11.0", machine="aarch64", suffix=".dylib"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the wheels and the source archive of a release into dist/.")
    tags = [entry.tag for entry in PLATFORMS]
    parser.add_argument("--platform", choices=[*tags, "here"], help="build only the wheel of this platform")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    here = f"manylinux_2_17_{platform.machine()}"
    wanted = {"here": {here}, None: set(tags)}.get(args.platform, {args.platform})
    os.environ["SOURCE_DATE_EPOCH"] = str(_commit_time_s())
    shutil.rmtree(args.output, ignore_errors=True)
    for entry in PLATFORMS:
        if entry.tag in wanted:
            _build_wheel(entry, args.output)
    if args.platform is None:
        with tempfile.TemporaryDirectory() as folder:  # the archive, and out of it the wheel without libraries
            _build(_copy_of_sources(Path(folder)), args.output)
    for path in sorted(args.output.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path}")


def _build_wheel(entry: Platform, output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = _copy_of_sources(Path(folder))
        libraries = root / PACKAGED.relative_to(ROOT)
        libraries.mkdir()
        for isa in INSTRUCTION_SETS.values():
            if isa.machine == entry.machine:
                print(f"{entry.tag}: compiling {isa.name}", flush=True)
                compiler = (sys.executable, "-m", "ziglang", "cc", "-target", entry.target, f"-mcpu={isa.zig_cpu}")
                name = library_name(isa, suffix=entry.suffix)
                compile_library(isa, libraries / name, compiler=compiler, extra_options=NO_DEBUG_INFO)
        _build(root, output, "--wheel", f"--config-setting=--build-option=--plat-name={entry.tag}")


def _copy_of_sources(folder: Path) -> Path:
    """A copy to build in: setuptools leaves folders behind, and would put them into the next wheel."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=IGNORED)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def _build(root: Path, output: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), *options, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def _commit_time_s() -> int:
    """The time of all files in a wheel; outside of a clone 1980, the first that a zip knows."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 315_532_800)


if __name__ == "__main__":
    main()
