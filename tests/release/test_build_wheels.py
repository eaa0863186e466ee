"""What the wheels of a release hold; `make test-wheel` builds one and serves from it."""

import importlib.util
import sys
from pathlib import Path

import pytest

from headwater.devices.cpu import kernel_build

SCRIPT = Path(__file__).parents[2] / "release" / "build_wheels.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_wheels", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_instruction_set_is_in_a_wheel(script, monkeypatch, tmp_path):
    """A set for another kind of machine would be compiled on the first start there, or not at all."""
    compiled, built = {}, {}

    def compile_library(isa, output, *, compiler, extra_options):
        compiled[output] = (isa.name, compiler[5], compiler[6])
        output.write_bytes(b"library")

    def build(root, output, *options):
        folder = root / "src/headwater/devices/cpu/libraries"
        built[options[-1].rpartition("=")[2]] = [compiled[path][0] for path in folder.iterdir()]
        expected = {kernel_build.library_name(kernel_build.INSTRUCTION_SETS[compiled[path][0]], suffix=path.suffix)
                    for path in folder.iterdir()}  # fmt: skip
        assert {path.name for path in folder.iterdir()} == expected, "the loader looks for these names"

    monkeypatch.setattr(script, "compile_library", compile_library)
    monkeypatch.setattr(script, "_build", build)
    for platform in script.PLATFORMS:
        script._build_wheel(platform, tmp_path)
    assert {name for names in built.values() for name in names} == set(kernel_build.INSTRUCTION_SETS)
    assert all(("neon" in names) == tag.endswith(("aarch64", "arm64")) for tag, names in built.items())
    targets = {(name, target, cpu) for name, target, cpu in compiled.values()}
    assert ("avx2", "x86_64-linux-gnu.2.17", "-mcpu=x86_64_v3") in targets


def test_nothing_that_was_built_before_gets_into_a_wheel(script, monkeypatch, tmp_path):
    """A library of another machine, or of older sources, lay in the folder that setuptools packs."""
    root = tmp_path / "clone"
    left_over = root / "src/headwater/devices/cpu/libraries/old.so"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    (root / "src/headwater.egg-info").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src/headwater/module.py"):
        (root / name).touch()
    monkeypatch.setattr(script, "ROOT", root)
    (tmp_path / "copy").mkdir()
    copy = script._copy_of_sources(tmp_path / "copy")
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", "README.md", "LICENSE", "src/headwater/module.py"}
