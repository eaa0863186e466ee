"""New weights for a model of quantised weights: quantised again, or plain, from files."""

import time
from pathlib import Path

import numpy as np
from quantised_checkpoints import CONFIG, write_checkpoint, write_folder

from headwater.devices.cpu.device import CpuDevice
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.weight_store import Checkpoint, StagedModel, WeightStore
from headwater.models.loader import load_model, resolve_model

UP = "model.layers.0.mlp.up_proj.weight"


def open_store(folder: Path) -> tuple[WeightStore, CpuRunner]:
    device = CpuDevice(num_threads=1)
    loaded = load_model(resolve_model(str(folder)), device=device)
    runner = CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=16), num_pages=8, max_running=2)
    return WeightStore(runner, loaded, device=device, checkpoint=Checkpoint(str(folder), "auto"), seed=0), runner


def staged(store: WeightStore, folder: Path) -> StagedModel:
    found, deadline_s = store.stage(str(folder), "auto"), time.monotonic() + 30
    while not found.is_ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    return found


def numbers(runner: CpuRunner, name: str) -> np.ndarray:
    return runner.model.get_by_name(name).to_float32()


def test_a_checkpoint_is_read_in_its_own_layout(tmp_path: Path) -> None:
    """Of another publisher, or not quantised at all: its config.json says so."""
    write_checkpoint(tmp_path / "first", "packed")
    store, runner = open_store(tmp_path / "first")
    other = write_checkpoint(tmp_path / "other", "awq")
    found = staged(store, tmp_path / "other")
    assert found.error() is None and found.is_whole
    store.swap(found)
    assert np.abs(numbers(runner, UP) - other[UP]).max() < 0.005 * 2 / 16
    plain = {name: ("F32", value.astype(np.float32)) for name, value in other.items()}
    write_folder(tmp_path / "plain", CONFIG, plain)
    found = staged(store, tmp_path / "plain")
    store.swap(found)
    assert np.allclose(numbers(runner, UP), other[UP], rtol=2**-8)


def test_weights_without_a_config_have_the_layout_of_the_served_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "first", "gptq")
    store, runner = open_store(tmp_path / "first")
    before = numbers(runner, UP)
    other = write_checkpoint(tmp_path / "other", "gptq", damp_percent=0.05)
    changed = staged(store, tmp_path / "other").weights_id
    (tmp_path / "other" / "config.json").unlink()
    found = staged(store, tmp_path / "other")
    assert found.error() is None and found.weights_id == changed
    store.swap(found)
    assert np.allclose(numbers(runner, UP), before) and np.allclose(before, other[UP], atol=1e-6)


def test_a_part_may_be_plain_and_one_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """A trainer writes a matrix in plain numbers over quantised ones; codes without their scales are refused."""
    write_checkpoint(tmp_path / "first", "awq")
    store, runner = open_store(tmp_path / "first")
    gate = numbers(runner, "model.layers.0.mlp.gate_proj.weight")
    plain = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
    write_folder(tmp_path / "part", CONFIG, {UP: ("F32", plain)})
    found = staged(store, tmp_path / "part")
    store.swap(found)
    assert np.allclose(numbers(runner, UP), plain, rtol=2**-8)
    assert np.allclose(numbers(runner, "model.layers.0.mlp.gate_proj.weight"), gate, rtol=2**-8)
    stored = UP.replace("weight", "qweight")
    write_folder(tmp_path / "codes", CONFIG, {stored: ("I32", np.zeros((128, 32)))})
    (tmp_path / "codes" / "config.json").unlink()
    assert f"tensor '{stored}' has no " in str(staged(store, tmp_path / "codes").error())
