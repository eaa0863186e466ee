"""New weights on a GPU go into the memory of the old ones, so that CUDA graphs stay as they are."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.products.linear import CudaLinear
from headwater.devices.gpu_note import FILLED, FILLING, FREED, set_state, write_note
from headwater.execution.gpu_runner import GpuRunner
from headwater.execution.weight_store import Checkpoint, StagedModel, WeightStore
from headwater.models.loader import load_model, resolve_model
from headwater.models.safetensors_file import SafetensorsFile
from tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_model("qwen3", tmp_path / "base", num_layers=2)
    return tmp_path / "base"


@pytest.fixture
def store(folder: Path) -> WeightStore:
    device = CudaDevice(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
    layout = loaded.kv_layout(page_size=4)
    runner = GpuRunner(loaded, device, layout=layout, num_pages=4, max_running=2, max_context=16)
    return WeightStore(runner, loaded, device=device, checkpoint=Checkpoint(str(folder), "auto"), seed=0)


def hashes(store: WeightStore) -> dict[str, str]:
    hashing = store.hash()
    deadline_s = time.monotonic() + 30
    while not hashing.is_ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return hashing.found()


def put(store: WeightStore, folder: Path, tensors: dict[str, torch.Tensor]) -> StagedModel:
    path = folder.parent / f"sent-{time.monotonic_ns()}"
    path.mkdir()
    save_file(tensors, path / "000001.safetensors")
    staged = store.stage_received(str(path), "sent")
    while not staged.is_ready():
        time.sleep(0.002)
    assert staged.error() is None
    store.swap(staged)
    return staged


def addresses(store: WeightStore) -> dict[str, int]:
    return {name: array.data_ptr() for name, array in store._runner.model.iter_named()}


@pytest.mark.parametrize("is_whole", [True, False])
def test_new_weights_lie_where_the_old_ones_lay(store: WeightStore, folder: Path, is_whole: bool) -> None:
    before, places, model = hashes(store), addresses(store), store._runner.model
    tensors = {name: tensor * 1.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    sent = tensors if is_whole else {Q_PROJ: tensors[Q_PROJ], NORM: tensors[NORM]}
    staged = put(store, folder, sent)
    assert store._runner.model is model
    assert addresses(store) == places
    after = hashes(store)
    assert {name for name in before if before[name] != after[name]} == set(sent)
    assert (staged.weights_id, staged.num_tensors) == ("sent", len(sent)), "facts outlive the staged copy"
    found = torch.tensor(store.values(Q_PROJ, 5)[2])
    assert torch.equal(found, tensors[Q_PROJ].reshape(-1)[:5])


def test_the_second_copy_is_freed(store: WeightStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory goes back to the driver, in a thread that no step waits for."""
    trimmed = threading.Event()
    monkeypatch.setattr(store._device, "trim_memory", trimmed.set)
    made: list[CudaLinear] = []
    right = CudaLinear.__init__

    def init(self: CudaLinear, *args: Any, **more: Any) -> None:
        made.append(self)
        right(self, *args, **more)

    monkeypatch.setattr(CudaLinear, "__init__", init)
    staged = put(store, folder, load_file(folder / "model.safetensors"))
    assert trimmed.wait(30)
    assert made
    assert staged.found().model is None


def test_weights_after_a_release_are_a_model_of_their_own(store: WeightStore, folder: Path) -> None:
    before = hashes(store)
    store.release()
    staged = store.reload()
    while not staged.is_ready():
        time.sleep(0.002)
    store.swap(staged)
    assert hashes(store) == before


@pytest.fixture
def noted(store: WeightStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bucket whose file is not filled yet: its numbers lie in memory that the device can open as "here"."""
    path = folder.parent / "noted"
    path.mkdir()
    tensor = load_file(folder / "model.safetensors")[Q_PROJ] * 3
    save_file({NORM: torch.full((64,), 7.0), Q_PROJ: torch.zeros_like(tensor)}, path / "000001.safetensors")
    shared = torch.cat([torch.full((64,), 5.0), tensor.reshape(-1)]).view(torch.uint8)
    if SafetensorsFile(path / "000001.safetensors").tensors[NORM].start > SafetensorsFile(
        path / "000001.safetensors"
    ).tensors[Q_PROJ].start:
        shared = torch.cat([tensor.reshape(-1), torch.full((64,), 5.0)]).view(torch.uint8)
    monkeypatch.setattr(store._device, "open_shared", lambda handle: shared if handle == ("here", b"x", (1,)) else None)
    return path


def staged_from(store: WeightStore, path: Path, *, in_place: bool = False) -> StagedModel:
    return store.stage_received(str(path), "sent", in_place=in_place)


def wait(staged: StagedModel) -> StagedModel:
    deadline_s = time.monotonic() + 30
    while not staged.is_ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    return staged


@pytest.mark.parametrize("state", [FILLING, FILLED])
def test_tensors_come_from_the_memory_that_a_note_names(store: WeightStore, noted: Path, state: bytes) -> None:
    note = write_note(noted / "000001.safetensors", ("here", b"x", (1,)))
    set_state(note, state)
    staged = wait(staged_from(store, noted))
    assert staged.error() is None
    store.swap(staged)
    assert store.values(NORM, 2)[2] == (5.0, 5.0)
    assert store.values(Q_PROJ, 1)[2] != (0.0,)


@pytest.mark.parametrize("why", ["freed", "cannot be opened", "in place"])
def test_else_the_file_is_read_once_it_is_whole(store: WeightStore, noted: Path, why: str) -> None:
    handle = ("elsewhere",) if why == "cannot be opened" else ("here", b"x", (1,))
    note = write_note(noted / "000001.safetensors", handle)
    staged = staged_from(store, noted, in_place=why == "in place") if why != "freed" else None
    time.sleep(0.05)
    set_state(note, FREED if why == "freed" else FILLED)
    staged = wait(staged or staged_from(store, noted))
    assert staged.error() is None
    if why == "in place":
        wait(store.overwrite(staged))  # type: ignore[arg-type]
    store.swap(staged)
    assert store.values(NORM, 1)[2] == (7.0,)


def test_memory_that_is_freed_while_it_is_read_is_refused(
    store: WeightStore, noted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have held the next bucket by then."""
    note, before = write_note(noted / "000001.safetensors", ("here", b"x", (1,))), hashes(store)
    right = store._device.take

    def take(*args: Any, **more: Any) -> torch.Tensor:
        set_state(note, FREED)
        return right(*args, **more)

    monkeypatch.setattr(store._device, "take", take)
    assert "were freed while they were read" in (wait(staged_from(store, noted)).error() or "")
    assert hashes(store) == before
