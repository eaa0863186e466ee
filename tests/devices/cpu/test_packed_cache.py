"""The cache of packed weights: what was stored is served bit for bit, and a file that is not whole never is."""

import fcntl
import os
import time
from pathlib import Path

import numpy as np
import pytest
from linear_setting import weight as random_weight

from headwater.devices.cpu import packed_cache
from headwater.devices.cpu.experts.packed import PackedExperts
from headwater.devices.cpu.kernel_library import KernelLibrary, usable_kernels
from headwater.devices.cpu.packed_cache import PackedCache
from headwater.devices.cpu.packed_file import Layer, PackedFile, Parts
from headwater.devices.cpu.packed_layers import PackedGatedLinear, PackedLinear
from headwater.devices.device import Routing
from headwater.devices.host_tensor import HostTensor


@pytest.fixture
def library() -> KernelLibrary:
    found = usable_kernels()
    if found is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    return found


@pytest.fixture
def cache(tmp_path: Path, library: KernelLibrary) -> PackedCache:
    return PackedCache(tmp_path / "packed", max_bytes=1 << 20, library=library, min_bytes=0)


def _parts(library: KernelLibrary, seed: int = 0) -> dict[str, HostTensor | Layer]:
    q, k, v, gate, up = (random_weight(form, (32, 64), seed + i) for i, form in enumerate(FORMS))
    bias = [HostTensor.of(np.arange(32, dtype=np.float32)).astype("bfloat16") for _ in range(3)]
    return {
        "norm": HostTensor.of(np.linspace(0, 1, 7, dtype=np.float32)).astype("bfloat16"),
        "qkv": PackedLinear.of(library, [q, k, v], bias, num_threads=1),
        "gate": PackedGatedLinear.of(library, gate, up, gate_bias=bias[0], up_bias=bias[1], num_threads=1),
        "down": PackedLinear.of(library, [random_weight("Q4_0", (40, 64), seed)], num_threads=1),
    }


FORMS = ("Q8_0", "Q4_1", "Q4_1", "bfloat16", "bfloat16")


def _stored(cache: PackedCache, parts: Parts, weights: str = "some files") -> Path:
    """The file that the cache has made."""
    before = set(cache._folder.glob("*.packed"))
    cache.store(weights, parts, weights_id="w1", num_bytes=123)
    cache.wait()
    (path,) = set(cache._folder.glob("*.packed")) - before
    return path


def _assert_equal(found: PackedFile, parts: Parts) -> None:
    norm = found.load("norm")
    assert (norm.format, norm.shape) == ("bfloat16", (7,))
    assert isinstance(parts["norm"], HostTensor)
    np.testing.assert_array_equal(norm.data, parts["norm"].data)
    layers = {"qkv": found.linear(["qkv"]), "gate": found.gated_linear(["gate", "up"]), "down": found.linear(["down"])}
    for name, layer in layers.items():
        expected = parts[name]
        assert not isinstance(expected, HostTensor)
        for ours, theirs in zip(layer.packed, expected.packed, strict=True):
            np.testing.assert_array_equal(ours.blocks, theirs.blocks)
            assert ours.blocks.ctypes.data % 64 == 0 and not ours.blocks.flags.writeable
            assert (ours.bias is None) == (theirs.bias is None)
            assert ours.bias is None or (ours.bias == theirs.bias).all()
        for (weight, bias), (other, other_bias) in zip(layer.unpack(), expected.unpack(), strict=True):
            assert weight.format == other.format
            np.testing.assert_array_equal(weight.data, other.data)
            assert (bias is None) == (other_bias is None)
            assert bias is None or other_bias is None or (bias.data == other_bias.data).all()


def test_what_was_stored_is_mapped_bit_for_bit(cache: PackedCache, library: KernelLibrary) -> None:
    parts = _parts(library)
    assert cache.open("some files") is None
    path = _stored(cache, parts)
    found = cache.open("some files")
    assert found is not None and (found.weights_id, found.num_bytes) == ("w1", 123)
    _assert_equal(found, parts)
    path.unlink()  # another server makes room
    _assert_equal(found, parts)


def test_experts_are_mapped_bit_for_bit(cache: PackedCache, library: KernelLibrary) -> None:
    """Both stacks, and each matrix under its expert."""
    kinds = (("Q4_0", (32, 64)), ("Q4_0", (32, 64)), ("bfloat16", (64, 32)))
    given = [
        tuple(random_weight(form, shape, seed=10 * expert + which) for which, (form, shape) in enumerate(kinds))
        for expert in range(3)
    ]
    routing = Routing(2, renormalises=True)
    experts = PackedExperts.of(library, given, num_experts=3, routing=routing, num_threads=2)
    _stored(cache, {"experts.0.gate": experts})
    found = cache.open("some files")
    assert found is not None
    names = [[f"experts.{expert}.{which}" for which in ("gate", "up", "down")] for expert in range(3)]
    layer = found.experts(names, routing)
    assert layer.num_experts == 3
    for ours, theirs in zip(layer.packed, experts.packed, strict=True):
        np.testing.assert_array_equal(ours.blocks, theirs.blocks)
        assert ours.blocks.ctypes.data % 64 == 0 and not ours.blocks.flags.writeable
    for expert, matrices in enumerate(given):
        for which, weight in enumerate(matrices):
            np.testing.assert_array_equal(layer.matrix(expert, which).to_float32(), weight.to_float32())


def test_other_files_other_kernels_and_other_code_have_their_own_weights(
    cache: PackedCache, library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of an older layout would be read as noise."""
    _stored(cache, _parts(library))
    assert cache.open("some files, changed") is None
    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "_code_hash", lambda: "an edited source")
        assert cache.open("some files") is None
    with monkeypatch.context() as patch:
        patch.setattr(library, "path", Path("kernels-of-another-set.so"))
        assert cache.open("some files") is None
    assert cache.open("some files") is not None


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _cut_header(path: Path) -> None:
    os.truncate(path, 100)


def _lengthened(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(64))


def _damaged_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[120] ^= 1
    path.write_bytes(data)


def _of_others(path: Path) -> None:
    path.chmod(0o666)


def _renamed(path: Path) -> None:
    """A file of other weights under this name."""
    other = next(other for other in path.parent.glob("*.packed") if other != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [_cut, _empty, _cut_header, _lengthened, _damaged_header, _of_others, _renamed])
def test_a_file_that_is_not_whole_is_never_served_and_is_made_anew(
    cache: PackedCache, library: KernelLibrary, damage, caplog: pytest.LogCaptureFixture
) -> None:
    _stored(cache, _parts(library, seed=50), weights="others")
    parts = _parts(library)
    path = _stored(cache, parts)
    damage(path)
    assert cache.open("some files") is None
    assert "made anew" in caplog.text
    cache.store("some files", parts, weights_id="w1", num_bytes=123)
    cache.wait()
    found = cache.open("some files")
    assert found is not None
    _assert_equal(found, parts)


def test_the_least_recently_used_weights_make_room(tmp_path: Path, library: KernelLibrary) -> None:
    parts = _parts(library)
    size = _stored(PackedCache(tmp_path / "one", max_bytes=1 << 20, library=library, min_bytes=0), parts).stat().st_size
    cache = PackedCache(tmp_path / "two", max_bytes=int(2.5 * size), library=library, min_bytes=0)
    for age, weights in ((300, "a"), (200, "b")):
        os.utime(_stored(cache, parts, weights), (0, 1_000_000_000 - age))
    assert cache.open("a") is not None  # and is the newest now
    _stored(cache, parts, "c")
    assert [cache.open(weights) is not None for weights in "abc"] == [True, False, True]


def test_weights_of_another_version_go_after_an_hour_without_use(
    cache: PackedCache, library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every edit of the code would otherwise leave another copy of the model, up to the size of the cache."""
    parts = _parts(library)
    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "_code_hash", lambda: "older")
        old, recent = _stored(cache, parts, "a"), _stored(cache, parts, "b")
    own = _stored(cache, parts, "c")
    for path in (old, own):
        os.utime(path, (0, time.time() - 2 * 3600))
    new = _stored(cache, parts, "d")
    assert {path for path in (old, recent, own, new) if path.exists()} == {recent, own, new}


def test_what_is_too_large_or_too_small_for_the_cache_is_not_kept(tmp_path: Path, library: KernelLibrary) -> None:
    for limits in ({"max_bytes": 1000, "min_bytes": 0}, {"max_bytes": 1 << 30}):
        cache = PackedCache(tmp_path, library=library, **limits)
        cache.store("some files", _parts(library), weights_id="w1", num_bytes=1)
        cache.wait()
    assert list(tmp_path.iterdir()) == []


def test_one_process_writes_at_a_time_and_removes_what_a_killed_one_left(
    cache: PackedCache, library: KernelLibrary
) -> None:
    folder = cache._folder
    folder.mkdir()
    (folder / ".tmpkilled.tmp").write_bytes(bytes(1000))
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.store("some files", _parts(library), weights_id="w1", num_bytes=1)
        cache.wait()
        assert cache.open("some files") is None
    _stored(cache, _parts(library))
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".packed"]


def test_a_full_disk_costs_the_cache_and_nothing_else(
    cache: PackedCache, library: KernelLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_cache, "write_packed", fail)
    cache.store("some files", _parts(library), weights_id="w1", num_bytes=1)
    cache.wait()
    assert "No space left" in caplog.text
    assert cache.open("some files") is None
