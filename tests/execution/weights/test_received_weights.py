"""Tensors that a trainer sent, put in place of a real model's: whole, in parts, in place, and after a release."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headwater.devices.cpu.device import CpuDevice
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.weight_store import Checkpoint, StagedModel, WeightStore
from headwater.models.loader import load_model, resolve_model
from tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
NORM, Q_PROJ = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_model("llama", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def store(folder: Path) -> WeightStore:
    device = CpuDevice(num_threads=1)
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32", load_format="auto", seed=0)
    runner = CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=16), num_pages=8, max_running=2)
    return WeightStore(runner, loaded, device=device, checkpoint=Checkpoint(str(folder), "auto"), seed=0)


def staging(tmp_path: Path, *buckets: dict[str, torch.Tensor]) -> str:
    path = tmp_path / f"staged-{time.monotonic_ns()}"
    path.mkdir()
    for number, tensors in enumerate(buckets, 1):
        save_file(tensors, path / f"{number:06}.safetensors")
    return str(path)


def ended(staged: StagedModel) -> StagedModel:
    deadline_s = time.monotonic() + 30
    while not staged.is_ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    return staged


def hashes(store: WeightStore) -> dict[str, str]:
    hashing = store.hash()
    deadline_s = time.monotonic() + 30
    while not hashing.is_ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return hashing.found()


def put(store: WeightStore, path: str, weights_id: str, *, in_place: bool = False) -> StagedModel:
    staged = ended(store.stage_received(path, weights_id, in_place=in_place))
    assert staged.error() is None, staged.error()
    if in_place:
        overwriting = store.overwrite(staged)
        while not overwriting.is_ready():
            time.sleep(0.002)
        assert overwriting.error() is None
    store.swap(staged)
    return staged


@pytest.mark.parametrize("in_place", [False, True])
def test_received_tensors_are_those_of_a_checkpoint(
    store: WeightStore, folder: Path, tmp_path: Path, in_place: bool
) -> None:
    tensors = {name: tensor * 1.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    names = list(tensors)
    halves = [{name: tensors[name].contiguous() for name in part} for part in (names[::2], names[1::2])]
    staged = put(store, staging(tmp_path, *halves), "sent", in_place=in_place)
    assert (staged.weights_id, staged.is_whole) == ("sent", True)
    other = tmp_path / "written"
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    sent = hashes(store)
    store.swap(ended(store.stage(str(other), "auto")))
    assert hashes(store) == sent
    assert set(sent) == set(store.parameters()[0])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_part_changes_its_tensors_and_no_others(
    store: WeightStore, folder: Path, tmp_path: Path, in_place: bool
) -> None:
    before = hashes(store)
    shape = store.parameters()[0][Q_PROJ]
    staged = put(store, staging(tmp_path, {NORM: torch.ones(64)}, {Q_PROJ: torch.zeros(shape)}), "x", in_place=in_place)
    assert (staged.is_whole, staged.num_tensors) == (False, 2)
    after = hashes(store)
    assert {name for name in before if before[name] != after[name]} == {NORM, Q_PROJ}
    assert store.values(Q_PROJ, 3)[2] == (0.0, 0.0, 0.0)


def test_of_a_tensor_that_was_sent_twice_the_last_one_counts(store: WeightStore, tmp_path: Path) -> None:
    """A trainer repeats a bucket whose answer it has not seen."""
    put(store, staging(tmp_path, {NORM: torch.full((64,), 1.0)}, {NORM: torch.full((64,), 2.0)}), "x")
    assert store.values(NORM, 1)[2] == (2.0,)


def test_a_release_and_a_resume_bring_received_tensors_back(store: WeightStore, tmp_path: Path) -> None:
    put(store, staging(tmp_path, {NORM: torch.full((64,), 7.0)}), "x")
    store.release()
    staged = ended(store.reload())
    assert (staged.error(), staged.weights_id, staged.has_changed) == (None, "x", False)
    store.swap(staged)
    assert store.values(NORM, 1)[2] == (7.0,)


def test_what_the_model_cannot_take_is_refused_before_anything_changes(store: WeightStore, tmp_path: Path) -> None:
    before = hashes(store)
    for tensors, reason in (
        ({NORM: torch.ones(63)}, "has shape [63]"),
        ({"model.nom.weight": torch.ones(64)}, "no tensor of this model"),
        ({NORM: torch.ones(64), "x": torch.ones(1)}, "which this architecture lacks"),
    ):
        for in_place in (False, True):
            staged = ended(store.stage_received(staging(tmp_path, tensors), "x", in_place=in_place))
            assert reason in (staged.error() or "")
    assert hashes(store) == before


def test_an_overwriting_that_fails_says_so(store: WeightStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = staging(tmp_path, {Q_PROJ: torch.zeros(store.parameters()[0][Q_PROJ])})
    staged = ended(store.stage_received(path, "x", in_place=True))
    monkeypatch.setattr(np, "empty", lambda *_, **__: 1 / 0)
    overwriting = store.overwrite(staged)
    while not overwriting.is_ready():
        time.sleep(0.002)
    assert "ZeroDivisionError" in (overwriting.error() or "")
