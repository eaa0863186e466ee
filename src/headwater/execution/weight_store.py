"""New weights for a served model: read and checked in a thread, then swapped in between two steps."""

import hashlib
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from headwater.devices.device import Device, ModelDevice
from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.execution.runner import Runner
from headwater.models.checkpoint_config import read_checkpoint_config
from headwater.models.config import ModelConfig
from headwater.models.decoder import Base, DecoderModel, build_decoder
from headwater.models.loader import (
    LoadedModel,
    LoadFormat,
    ModelFiles,
    Signature,
    check_unchanged,
    open_weights,
    resolve_model,
    share_of,
    weights_id_of,
    weights_signature,
)
from headwater.models.model_files import ModelFileError
from headwater.models.ranks.share import ModelShare
from headwater.models.weights import PlacedArray, PlacedWeights, WeightSource, check_shapes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files that were loaded, as the user named them."""

    path: str
    load_format: LoadFormat


@dataclass(frozen=True, slots=True)
class Layer:
    """A checkpoint and the model's tensors that it holds."""

    checkpoint: Checkpoint
    names: frozenset[str]
    content_id: str = ""  # hash of its files when it was read


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """A checkpoint that is being read. `end_ids` come from its own files; None if they name none."""

    layer: Layer
    files: ModelFiles
    signature: Signature
    end_ids: tuple[int, ...] | None


class ChangedWeights(ValueError):
    """The files of the released weights have changed."""


class Abandoned(Exception):
    """The update was given up: reading stops."""


def visible_layers(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers that later ones do not hide completely: the files that a reload must read.

    If all layers were kept, the files of every step of a training loop would stay in use.
    """
    hidden: set[str] = set()
    visible = []
    for layer in reversed(layers):
        if not layer.names <= hidden:
            visible.append(layer)
            hidden |= layer.names
    return tuple(reversed(visible))


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A packed model that can replace the served one."""

    model: DecoderModel
    weights_id: str
    layers: tuple[Layer, ...]  # what was read for it
    num_tensors: int
    end_ids: tuple[int, ...]  # the tokens that end an answer, as the newest checkpoint's own files know them
    is_whole: bool  # it holds nothing of the model before
    has_changed: bool = False  # for a reload: its content differs from what was released


class StagedModel:
    """A model that a thread reads, checks and packs; the loop asks `is_ready`.

    The thread may hang for ever in a read (of a network mount), so nothing joins it or waits for it.
    """

    def __init__(self, build: Callable[[threading.Event], BuiltModel], *, is_reload: bool) -> None:
        self._build = build
        self._built: BuiltModel | None = None
        self._error: str | None = None
        self._abandoned = threading.Event()
        self.has_changed = False
        self.is_reload = is_reload  # it read the whole model, which replaces the one in place
        self._thread = threading.Thread(target=self._run, name="stage-weights", daemon=True)
        self._thread.start()

    def is_ready(self) -> bool:
        return not self._thread.is_alive()

    def error(self) -> str | None:
        return self._error

    def abandon(self) -> None:
        """The model will not be used: stop reading soon, and drop what was read."""
        self._abandoned.set()
        self._built = None

    @property
    def weights_id(self) -> str:
        return self._ready.weights_id

    @property
    def num_tensors(self) -> int:
        return self._ready.num_tensors

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self._ready.end_ids

    @property
    def is_whole(self) -> bool:
        return self._ready.is_whole

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self._ready.layers

    def model(self) -> DecoderModel:
        return self._ready.model

    @property
    def _ready(self) -> BuiltModel:
        assert self._built is not None, "not loaded, or in vain"
        return self._built

    def _run(self) -> None:
        try:
            built = self._build(self._abandoned)
            self.has_changed = built.has_changed
            if not self._abandoned.is_set():
                self._built = built
        except Abandoned:
            self._error = "given up"
        except ChangedWeights as error:
            self.has_changed = True
            self._error = str(error)
        except Exception as error:  # noqa: BLE001  whatever a torn file makes its reader raise, the old weights serve on
            _log.warning("new weights were refused: %s", error)
            self._error = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


class WeightStore:
    """A runner's weights, for the control plane. A later checkpoint may hold a part of the tensors.

    With `keeps_on_host` a release keeps a copy in host memory (on a CPU: the weights themselves, where they are), and a
    reload takes that instead of the files.
    """

    def __init__(
        self,
        runner: Runner,
        loaded: LoadedModel,
        *,
        device: Device,
        checkpoint: Checkpoint,
        seed: int,
        hub_refusal: str | None = "hub ids are not fetched",
        keeps_on_host: bool = False,
        end_ids: tuple[int, ...] = (),
    ) -> None:
        """`hub_refusal`: why a path that a caller names may not be a hub id; None if it may.

        `end_ids`: tokens that end an answer by the files of the weights in place, besides those of the start.
        """
        self._runner = runner
        self._hub_refusal = hub_refusal
        self._config: ModelConfig = loaded.config
        self._form = loaded.form
        self._weights_bytes = loaded.weights_bytes
        self._weights_id = loaded.weights_id
        self._device = device
        self._seed = seed
        # the checkpoints that the model consists of, in order; later ones hide tensors of earlier ones
        self._loaded = (Layer(checkpoint, frozenset(loaded.config.parameter_shapes()), loaded.weights_id),)
        self._end_ids = end_ids
        self._keeps_on_host = keeps_on_host
        self._kept: DecoderModel | HostTensors | None = None  # of released weights

    def stage(self, path: str, load_format: str) -> StagedModel:
        checkpoint = Checkpoint(path, load_format)  # type: ignore[arg-type]  # checked by the loader
        return StagedModel(lambda abandoned: self.build((checkpoint,), abandoned), is_reload=False)

    def reload(self, *, accepts_changes: bool = False) -> StagedModel:
        kept, released = self._kept, self._loaded
        if kept is not None:
            return StagedModel(lambda _: self._build_kept(kept), is_reload=True)
        return StagedModel(
            lambda abandoned: self.build(
                tuple(layer.checkpoint for layer in released),
                abandoned,
                released=released,
                accepts_changes=accepts_changes,
            ),
            is_reload=True,
        )

    def swap(self, staged: StagedModel) -> None:
        self._runner.replace_model(staged.model())
        self._weights_id, self._end_ids = staged.weights_id, staged.end_ids
        self._kept = None
        self._loaded = visible_layers(staged.layers if staged.is_reload else (*self._loaded, *staged.layers))

    def release(self) -> int:
        stays = self._keeps_on_host and self._device.name == "cpu"
        if self._keeps_on_host:
            model = self._runner.model
            self._kept = model if stays else HostTensors(model, self._device)
        self._runner.replace_model(None)
        self._device.trim_memory()
        return 0 if stays else self._weights_bytes

    def values(self, name: str, num_values: int) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
        shape = self._config.parameter_shapes()[name]
        num_rows = -(-num_values // math.prod(shape[1:]))
        first = self._device.to_host(self._runner.model.get_by_name(name), max_rows=num_rows)
        num_here = math.prod(first.shape) if first.shape[1:] == shape[1:] else first.shape[1]
        if num_values > num_here:
            raise ValueError(f"rank 0 has the first {num_here} numbers of {name!r} only, {num_values} were asked for")
        return first.format, shape, tuple(first.to_float32().reshape(-1)[:num_values].tolist())

    def build(
        self,
        checkpoints: tuple[Checkpoint, ...],
        abandoned: threading.Event,
        *,
        released: tuple[Layer, ...] = (),
        accepts_changes: bool = False,
    ) -> BuiltModel:
        """A packed model of the current weights overlaid with `checkpoints`.

        `released`: for a reload, what the checkpoints held when the weights were released. If they hold something else
        now, ChangedWeights is raised before a tensor is read, unless `accepts_changes`. Runs in the staging thread.
        Raises ValueError that names what does not fit; nothing is changed then.
        """
        shapes = self._config.parameter_shapes()
        overlay = Overlay(self._config, self._runner.model if self._runner.has_model else None, abandoned)
        opened = [self._open(checkpoint, overlay) for checkpoint in checkpoints]
        layers = tuple(each.layer for each in opened)
        is_whole = overlay.num_new == len(shapes)
        ids = [layer.content_id for layer in layers]
        has_changed = bool(released) and ids != [layer.content_id for layer in released]
        weights_id = self._weights_id if released and not has_changed else self._identity(ids, is_whole=is_whole)
        if has_changed and not accepts_changes:
            raise ChangedWeights(
                f"the files of the released weights have changed: weights_id {self._weights_id} was released, "
                f"{', '.join(checkpoint.path for checkpoint in checkpoints)} would give {weights_id}"
            )
        check_shapes(shapes, overlay, tied_head=self._config.tie_word_embeddings)
        share = ModelShare.of(self._device.ranks)
        placed = PlacedWeights(share_of(overlay, self._config, share, form=self._form), self._device, self._form)
        model = build_decoder(self._config, placed, self._device, base=overlay.base)
        for each in opened:
            check_unchanged(each.files, each.signature)
        return BuiltModel(
            model,
            weights_id=weights_id,
            layers=layers,
            num_tensors=overlay.num_new,
            end_ids=next((each.end_ids for each in reversed(opened) if each.end_ids is not None), ()),
            has_changed=has_changed,
            is_whole=is_whole,
        )

    def _open(self, checkpoint: Checkpoint, overlay: "Overlay") -> OpenedCheckpoint:
        """Add a checkpoint to the overlay, and hash its files."""
        self._check_local(checkpoint.path)
        files = resolve_model(checkpoint.path)
        signature = weights_signature(files)
        load_format = checkpoint.load_format
        config = read_checkpoint_config(files, self._config)
        source = open_weights(files, self._config, load_format=load_format, seed=self._seed)
        overlay.add(source)
        content_id = weights_id_of(
            files,
            self._config,
            form=self._form,
            load_format=load_format,
            seed=self._seed,
            device=self._device.name,
        )
        names = frozenset(source.shapes()) & self._config.parameter_shapes().keys()
        end_ids = None if config is None else config.eos_token_ids
        return OpenedCheckpoint(Layer(checkpoint, names, content_id), files, signature, end_ids)

    def _check_local(self, path: str) -> None:
        """ValueError if `path` is not on this machine: a client that updates weights must not cause network traffic."""
        if self._hub_refusal is not None and not os.path.lexists(os.path.expanduser(path)):
            raise ValueError(f"model_path {path!r} is no folder or .gguf file of this machine; {self._hub_refusal}")

    def _build_kept(self, kept: "DecoderModel | HostTensors") -> BuiltModel:
        if not isinstance(kept, DecoderModel):
            kept = build_decoder(self._config, PlacedWeights(kept, self._device, self._form), self._device)
        return BuiltModel(
            kept,
            weights_id=self._weights_id,
            layers=self._loaded,
            num_tensors=len(self._config.parameter_shapes()),
            end_ids=self._end_ids,
            is_whole=True,
        )

    def _identity(self, ids: list[str], *, is_whole: bool) -> str:
        """A content hash of the checkpoint that holds all tensors, and of each later one, in order."""
        first, *others = ids if is_whole else [self._weights_id, *ids]
        for other in others:
            first = hashlib.blake2b(f"{first}\n{other}".encode(), digest_size=16).hexdigest()
        return first


class HostTensors:
    """A `WeightSource`: all parameters of a model, copied to host memory."""

    place = "the weights kept in host memory"

    def __init__(self, model: DecoderModel, device: ModelDevice) -> None:
        names = model.config.parameter_shapes()
        self._tensors = {name: device.to_host(model.get_by_name(name)) for name in names}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def load(self, name: str) -> HostTensor:
        return self._tensors[name]


class Overlay:
    """A `WeightSource` of a model's own tensors, each hidden by the newest checkpoint that holds it."""

    place: Path | str = "the served weights"

    def __init__(self, config: ModelConfig, model: DecoderModel | None, abandoned: threading.Event) -> None:
        self._model = model
        self._abandoned = abandoned
        self._own = config.parameter_shapes()
        self._newest: dict[str, WeightSource] = {}

    @property
    def num_new(self) -> int:
        """Tensors of the model that some checkpoint holds."""
        return sum(1 for name in self._newest if name in self._own)

    @property
    def base(self) -> Base | None:
        """The model, if there is one, and what the checkpoints replace."""
        return None if self._model is None else Base(self._model, frozenset(self._newest))

    def add(self, source: WeightSource) -> None:
        """Add `source` on top. ValueError if it holds no tensor of this model."""
        if not any(name in self._own for name in source.shapes()):
            raise ModelFileError(source.place, "the checkpoint holds no tensor of this model")
        self.place = source.place
        self._newest |= dict.fromkeys(source.shapes(), source)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        own = self._own if self._model is not None else {}
        return {**own, **{name: source.shapes()[name] for name, source in self._newest.items()}}

    def load(self, name: str) -> HostTensor | RandomTensor | PlacedArray:
        if self._abandoned.is_set():
            raise Abandoned
        source = self._newest.get(name)
        if source is not None:
            return source.load(name)
        assert self._model is not None
        return PlacedArray(self._model.get_by_name(name))
