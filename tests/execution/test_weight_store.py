"""What a model consists of after many updates: names, values and files that a reload reads."""

import gc
import json
import os
import shutil
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.devices.cpu.packed_cache import PackedCache
from headwater.devices.cpu.packed_layers import PackedLinear
from headwater.execution import weight_store
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.weight_store import (
    Checkpoint,
    Layer,
    StagedModel,
    WeightStore,
    visible_layers,
)
from headwater.execution.weights.sources import HostTensors
from headwater.models import loader
from headwater.models.config import read_hf_config
from headwater.models.loader import load_model, resolve_model
from tiny_gguf import write_gguf_model
from tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
NORM = "model.norm.weight"
INPUT_NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_model("llama", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def store(folder: Path) -> WeightStore:
    device = CpuDevice(num_threads=1)
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32", load_format="auto", seed=0)
    runner = CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=16), num_pages=8, max_running=2)
    checkpoint = Checkpoint(str(folder), "auto")
    return WeightStore(runner, loaded, device=device, checkpoint=checkpoint, seed=0, hub_refusal="no hub ids here")


@pytest.fixture
def mapped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    """A store of weights that lie in a mapped file of the cache."""
    library = usable_kernels()
    if library is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    monkeypatch.setattr(loader, "_SETTLED_NS", 0)
    cache = PackedCache(tmp_path / "packed", max_bytes=1 << 30, library=library, min_bytes=0)
    device = CpuDevice(num_threads=1)
    for _ in range(2):
        loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32", cache=cache)
        cache.wait()
    assert not loaded.model.layers[0].o.packed[0].blocks.flags.writeable
    runner = CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=16), num_pages=8, max_running=2)
    checkpoint = Checkpoint(str(folder), "auto")
    return WeightStore(runner, loaded, device=device, checkpoint=checkpoint, seed=0, keeps_on_host=True)


def wait(staged: StagedModel, *, is_refused: bool = False) -> StagedModel:
    deadline_s = time.monotonic() + 30
    while not staged.is_ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    assert (staged.error() is not None) == is_refused, staged.error()
    return staged


def update(store: WeightStore, folder: Path) -> str:
    staged = wait(store.stage(str(folder), "auto"))
    store.swap(staged)
    return staged.weights_id


def reload(store: WeightStore) -> str:
    store.release()
    staged = wait(store.reload())
    store.swap(staged)
    return staged.weights_id


def whole(folder: Path, number: int) -> Path:
    """Another checkpoint of everything."""
    other = folder.parent / f"step-{number}"
    shutil.copytree(folder, other)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {NORM: tensors[NORM] + number}, other / "model.safetensors", metadata={"format": "pt"})
    return other


def part(folder: Path, name: str, value: float) -> Path:
    other = folder.parent / f"part-{name}-{value}"
    other.mkdir()
    save_file({name: torch.full((64,), value)}, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_a_reload_reads_the_newest_checkpoint_only(store: WeightStore, folder: Path) -> None:
    """A trainer deletes the steps before the last; a server that wanted them all could never resume."""
    newest = ""
    for number in (1, 2, 3):
        step = whole(folder, number)
        newest = update(store, step)
        value = store.values(NORM, 1)
        if number < 3:
            shutil.rmtree(step)
    assert reload(store) == newest, "the same weights under another name would lose the cache"
    assert store.values(NORM, 1) == value


def test_a_reload_lays_parts_over_what_they_were_laid_over(store: WeightStore, folder: Path) -> None:
    base = store.values(INPUT_NORM, 1)
    hidden = part(folder, NORM, 2.0)
    update(store, hidden)
    newest = update(store, part(folder, NORM, 3.0))
    assert newest != update(store, part(folder, INPUT_NORM, 5.0))
    assert (store.values(NORM, 1)[2], store.values(INPUT_NORM, 1)[2]) == ((3.0,), (5.0,))
    shutil.rmtree(hidden)
    reload(store)
    assert (store.values(NORM, 1)[2], store.values(INPUT_NORM, 1)[2]) == ((3.0,), (5.0,))
    update(store, whole(folder, 4))
    assert store.values(INPUT_NORM, 1) == base, "a whole checkpoint leaves nothing of earlier parts"


def test_mapped_weights_are_updated_released_and_kept_like_others(mapped: WeightStore, folder: Path) -> None:
    """The file of the cache is never written to, and its removal takes nothing from a running server."""
    (packed,) = (folder.parent / "packed").glob("*.packed")
    contents = packed.read_bytes()
    base = mapped.values(INPUT_NORM, 1)
    newest = update(mapped, part(folder, NORM, 3.0))
    assert (mapped.values(NORM, 1)[2], mapped.values(INPUT_NORM, 1)) == ((3.0,), base)
    assert reload(mapped) == newest
    assert packed.read_bytes() == contents
    packed.unlink()
    assert (mapped.values(NORM, 1)[2], mapped.values(INPUT_NORM, 1)) == ((3.0,), base)
    update(mapped, whole(folder, 4))
    assert mapped.values(INPUT_NORM, 1) == base


def test_released_weights_are_freed_without_the_collector(store: WeightStore, folder: Path) -> None:
    """It leaves out what was loaded at the start, so a release freed nothing, and an update doubled the weights."""
    gc.disable()
    try:
        for number in range(2):
            packed = weakref.ref(_packed_blocks(store))
            if number == 0:
                reload(store)
            else:
                update(store, whole(folder, number))
            assert packed() is None
    finally:
        gc.enable()


def _packed_blocks(store: WeightStore) -> np.ndarray:
    model = store._runner.model
    layer = model.layers[0].o
    if not isinstance(layer, PackedLinear):
        pytest.skip("no kernels for this CPU, or no compiler")
    return layer.packed[0].blocks


def test_an_update_that_was_given_up_leaves_no_trace(store: WeightStore, folder: Path) -> None:
    wait(store.stage(str(whole(folder, 1)), "auto"))  # and never swapped: its caller went away
    shutil.rmtree(folder.parent / "step-1")
    value = store.values(NORM, 1)
    reload(store)
    assert store.values(NORM, 1) == value


def replace_file(folder: Path, number: int) -> None:
    """What a trainer does that writes every step into one folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {NORM: tensors[NORM] + number}, folder / "next", metadata={"format": "pt"})
    (folder / "next").rename(folder / "model.safetensors")


def ended(staged: StagedModel) -> StagedModel:
    deadline_s = time.monotonic() + 30
    while not staged.is_ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    return staged


def test_files_that_have_changed_since_the_release_are_refused_by_name(store: WeightStore, folder: Path) -> None:
    """The next step's weights must not serve under the last one's label and id."""
    latest = whole(folder, 1)
    old = update(store, latest)
    value = store.values(NORM, 1)
    store.release()
    replace_file(latest, 5)
    staged = ended(store.reload())
    assert staged.has_changed
    assert old in staged.error() and str(latest) in staged.error() and "would give" in staged.error()
    accepted = wait(store.reload(accepts_changes=True))
    assert accepted.has_changed and accepted.weights_id != old and accepted.weights_id in staged.error()
    store.swap(accepted)
    assert store.values(NORM, 1) != value
    assert reload(store) == accepted.weights_id, "they are what is released now"


def test_a_part_that_has_changed_is_noticed_too(store: WeightStore, folder: Path) -> None:
    overlay = part(folder, NORM, 2.0)
    newest = update(store, overlay)
    assert reload(store) == newest
    store.release()
    save_file({NORM: torch.full((64,), 9.0)}, overlay / "model.safetensors", metadata={"format": "pt"})
    assert ended(store.reload()).has_changed
    save_file({NORM: torch.full((64,), 2.0)}, overlay / "model.safetensors", metadata={"format": "pt"})
    staged = wait(store.reload())
    assert not staged.has_changed and staged.weights_id == newest, "the same bytes again are the same weights"


def test_covered_parts_do_not_make_a_reload_other_weights(store: WeightStore, folder: Path) -> None:
    update(store, part(folder, NORM, 2.0))
    newest = update(store, part(folder, NORM, 3.0))
    assert reload(store) == newest, "else the cache would be lost"


def test_kept_weights_need_no_files(folder: Path, store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_keeps_on_host", True)
    newest = update(store, latest := whole(folder, 1))
    value = store.values(NORM, 1)
    assert store.release() == 0, "a CPU's memory is the host's"
    shutil.rmtree(latest)
    staged = wait(store.reload())
    store.swap(staged)
    assert (staged.weights_id, staged.has_changed, store.values(NORM, 1)) == (newest, False, value)
    update(store, whole(folder, 2))
    assert store.values(NORM, 1) != value, "what was kept is not laid over new ones"


def test_weights_copied_to_the_host_are_the_same(store: WeightStore, folder: Path) -> None:
    """What a GPU's release keeps."""
    model = store._runner.model
    store._kept = HostTensors(model, store._device)
    store._runner.replace_model(None)
    staged = wait(store.reload())
    store.swap(staged)
    for name in model.config.parameter_shapes():
        found, kept = (it.get_by_name(name) for it in (store._runner.model, model))
        assert np.array_equal(found.data, kept.data) and found.format == kept.format


def numbers(store: WeightStore, name: str) -> np.ndarray:
    return store._device.to_host(store._runner.model.get_by_name(name)).to_float32()


def test_a_part_leaves_the_other_layers_packed_as_they_were(store: WeightStore, folder: Path) -> None:
    """Packing the whole model again for one tensor would cost its time, and twice its memory."""
    before = store._runner.model
    expected = {name: numbers(store, name) for name in before.config.parameter_shapes()}
    replaced = "model.layers.0.self_attn.k_proj.weight"
    other = folder.parent / "k"
    other.mkdir()
    tensor = torch.full(expected[replaced].shape, 0.5)
    save_file({replaced: tensor}, other / "model.safetensors", metadata={"format": "pt"})
    update(store, other)
    after = store._runner.model
    assert after is not before and after.layers[0].qkv is not before.layers[0].qkv
    assert after.layers[0].mlp == before.layers[0].mlp and after.layers[1].qkv is before.layers[1].qkv
    assert after.head is before.head
    expected[replaced] = tensor.numpy()
    assert all(np.array_equal(numbers(store, name), values) for name, values in expected.items())


def test_a_part_may_be_one_expert(tmp_path: Path) -> None:
    """The others of its layer keep their numbers, and the other layers and all routers their memory."""
    make_tiny_model("qwen3-moe-some-dense", tmp_path / "base")
    device = CpuDevice(num_threads=1)
    loaded = load_model(resolve_model(str(tmp_path / "base")), device=device, dtype="float32")
    runner = CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=16), num_pages=8, max_running=2)
    store = WeightStore(runner, loaded, device=device, checkpoint=Checkpoint(str(tmp_path / "base"), "auto"), seed=0)
    before = store._runner.model
    expected = {name: numbers(store, name) for name in before.config.parameter_shapes()}
    replaced = "model.layers.2.mlp.experts.4.up_proj.weight"
    other = tmp_path / "expert"
    other.mkdir()
    expected[replaced] = expected[replaced] * 2
    save_file({replaced: torch.from_numpy(expected[replaced])}, other / "model.safetensors", metadata={"format": "pt"})
    update(store, other)
    after = store._runner.model
    assert after.layers[2].mlp.experts is not before.layers[2].mlp.experts
    assert after.layers[2].mlp.router is before.layers[2].mlp.router
    assert after.layers[0].mlp.experts is before.layers[0].mlp.experts and after.layers[1].mlp == before.layers[1].mlp
    assert all(np.array_equal(numbers(store, name), values) for name, values in expected.items())


def test_a_part_over_blocks_changes_no_other_number(tmp_path: Path) -> None:
    """Blocks that share a packed layer with a new tensor keep their file's values, or a reload would serve others."""
    make_tiny_model("llama", tmp_path / "base")
    config, parameters = read_hf_config(tmp_path / "base"), load_file(tmp_path / "base" / "model.safetensors")
    path = write_gguf_model(tmp_path / "model.gguf", config, "llama", parameters, block_format="Q8_0")
    device = CpuDevice(num_threads=1)
    loaded = load_model(resolve_model(str(path)), device=device)
    runner = CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=16), num_pages=8, max_running=2)
    store = WeightStore(runner, loaded, device=device, checkpoint=Checkpoint(str(path), "auto"), seed=0)
    expected = {name: numbers(store, name) for name in config.parameter_shapes()}
    replaced = "model.layers.0.self_attn.q_proj.weight"
    other = tmp_path / "q"
    other.mkdir()
    save_file({replaced: parameters[replaced] * 0}, other / "model.safetensors", metadata={"format": "pt"})
    newest = update(store, other)
    expected[replaced] = np.zeros_like(expected[replaced])
    for _ in range(2):
        assert all(np.array_equal(numbers(store, name), values) for name, values in expected.items())
        assert reload(store) == newest


def fifo_in(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_among_the_files_is_refused_at_once(store: WeightStore, folder: Path, name: str) -> None:
    """Opening it would wait for a writer, with Python's lock held: the whole engine would stop."""
    value = store.values(NORM, 1)
    step = whole(folder, 1)
    fifo_in(step, name)
    staged = ended(store.stage(str(step), "auto"))
    assert f"{name}: is no regular file" in staged.error()
    assert store.values(NORM, 1) == value


def test_a_read_that_hangs_stops_nobody_and_the_next_update_works(
    store: WeightStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network mount that has gone away: its thread can be abandoned, never joined."""
    step, other = whole(folder, 1), whole(folder, 2)
    pipe_out, pipe_in = os.pipe()
    preadv, hangs = os.preadv, threading.Event()

    def hanging(descriptor: int, buffers, offset: int) -> int:
        if offset > 8 and os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(step)):
            hangs.set()
            os.read(pipe_out, 1)  # the system call blocks, as one of a hung mount does
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", hanging)
    hung = store.stage(str(step), "auto")
    assert hangs.wait(30)
    assert not hung.is_ready()
    hung.abandon()
    newest = update(store, other)
    assert not hung.is_ready()
    os.close(pipe_in)  # the mount is back
    assert ended(hung).error() == "given up"
    assert store._weights_id == newest
    os.close(pipe_out)


def test_files_that_change_while_they_are_read_are_refused(
    store: WeightStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tensors of one step would serve under the hash of another."""
    step = whole(folder, 1)
    hash_files = weight_store.weights_id_of

    def replaced_before_it_is_hashed(*args, **kwargs) -> str:
        replace_file(step, 7)
        return hash_files(*args, **kwargs)

    monkeypatch.setattr(weight_store, "weights_id_of", replaced_before_it_is_hashed)
    assert "model.safetensors: changed while it was read" in ended(store.stage(str(step), "auto")).error()


def test_visible_layers() -> None:
    def layer(path: str, *names: str) -> Layer:
        return Layer(Checkpoint(path, "auto"), frozenset(names))

    base, a, b, ab = layer("base", "a", "b", "c"), layer("a", "a"), layer("b", "b"), layer("ab", "a", "b")
    assert visible_layers((base, a, b)) == (base, a, b)
    assert visible_layers((base, a, b, ab)) == (base, ab)
    assert visible_layers((base, a, a)) == (base, a)
    assert visible_layers((base, a, base)) == (base,)


def test_a_hub_id_is_not_fetched_unless_allowed(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may update weights would otherwise choose what the server downloads."""
    asked: list[str] = []
    monkeypatch.setattr("headwater.execution.weight_store.resolve_model", asked.append)
    staged = store.stage("someone/some-model", "auto")
    deadline_s = time.monotonic() + 30
    while staged.error() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    assert "no hub ids here" in str(staged.error())
    assert not asked


def test_an_allowed_hub_id_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CpuDevice(num_threads=1)
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32", load_format="auto", seed=0)
    runner = CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=16), num_pages=8, max_running=2)
    start = Checkpoint(str(folder), "auto")
    allowing = WeightStore(runner, loaded, device=device, checkpoint=start, seed=0, hub_refusal=None)
    files = resolve_model(str(folder))
    monkeypatch.setattr("headwater.execution.weight_store.resolve_model", {"someone/some-model": files}.__getitem__)
    assert wait(allowing.stage("someone/some-model", "auto")).num_tensors > 0


def test_a_checkpoint_that_computes_otherwise_is_refused_and_the_old_one_serves_on(
    store: WeightStore, folder: Path
) -> None:
    """Its tensors fit: only its own config tells that its positions turn otherwise."""
    other, before = whole(folder, 1), store.values(NORM, 1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 5e5}}))
    staged = store.stage(str(other), "auto")
    wait(staged, is_refused=True)
    assert "config.json: the rotary embedding is default with theta 500000" in str(staged.error())
    assert store.values(NORM, 1) == before


def test_the_ends_that_a_checkpoint_names_come_with_it(store: WeightStore, folder: Path) -> None:
    other = whole(folder, 1)
    (other / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert wait(store.stage(str(other), "auto")).end_ids == (7, 2)
    assert wait(store.stage(str(part(folder, NORM, 2.0)), "auto")).end_ids == ()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", b"\xff" * 100, "is no whole safetensors file"),
        ("config.json", b"{", "is not valid JSON"),
        ("generation_config.json", b"[]", "must hold a JSON object, found a list"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "names the file 'b.safetensors'"),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named_with_the_reason(
    store: WeightStore, folder: Path, name: str, content: bytes, reason: str
) -> None:
    other = whole(folder, 1)
    (other / name).write_bytes(content)
    staged = store.stage(str(other), "auto")
    wait(staged, is_refused=True)
    assert staged.error() is not None and f"{name}: {reason}" in str(staged.error())
