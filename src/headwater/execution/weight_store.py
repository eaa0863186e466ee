"""New weights for a served model: read and checked in a thread, then swapped in between two steps."""

import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from headwater.devices.device import Device
from headwater.execution.runner import Runner
from headwater.execution.weights.received import ReceivedWeights
from headwater.execution.weights.sources import HostTensors, Overlay, checksums_of
from headwater.models.checkpoint_config import read_checkpoint_config
from headwater.models.config import ModelConfig
from headwater.models.decoder import DecoderModel
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
    with_layout_of,
)
from headwater.models.ranks.share import Floats, ModelShare, join
from headwater.models.reading.build_decoder import build_decoder, copy_decoder, overwrite_decoder
from headwater.models.reading.read_ahead import ReadAhead
from headwater.models.weights import IGNORED_SUFFIXES, PlacedWeights, WeightSource, check_shapes
from headwater.staged_read import StagedRead


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files that were loaded, as the user named them."""

    path: str
    load_format: LoadFormat
    weights_id: str = ""  # of tensors that a trainer sent, in a staging folder; empty: the files are hashed


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
    received: ReceivedWeights | None = None  # of tensors that a trainer sent


class ChangedWeights(ValueError):
    """The files of the released weights have changed."""


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

    model: DecoderModel | None  # None: its numbers are in the memory of another model by now
    weights_id: str
    layers: tuple[Layer, ...]  # what was read for it
    num_tensors: int
    end_ids: tuple[int, ...]  # the tokens that end an answer, as the newest checkpoint's own files know them
    is_whole: bool  # it holds nothing of the model before
    has_changed: bool = False  # for a reload: its content differs from what was released
    overwrite: Callable[[], None] | None = None  # puts its tensors into `model`, the one in place; None: they are there


class StagedModel(StagedRead[BuiltModel]):
    """A model that a thread reads, checks and packs (`control.ports.StagedWeights`)."""

    def __init__(self, build: Callable[[threading.Event], BuiltModel], *, is_reload: bool) -> None:
        self.is_reload = is_reload  # it read the whole model, which replaces the one in place
        super().__init__(build, name="stage-weights")

    @property
    def has_changed(self) -> bool:
        is_refused = isinstance(self._cause, ChangedWeights)
        return is_refused or (self._found is not None and self._found.has_changed)

    @property
    def weights_id(self) -> str:
        return self.found().weights_id

    @property
    def num_tensors(self) -> int:
        return self.found().num_tensors

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.found().end_ids

    @property
    def is_whole(self) -> bool:
        return self.found().is_whole

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.found().layers

    @property
    def overwrite(self) -> Callable[[], None] | None:
        """Puts the tensors into the model in place; None if they are in a model of their own."""
        return self.found().overwrite

    def model(self) -> DecoderModel:
        model = self.found().model
        assert model is not None, "it was dropped"
        return model

    def drop_model(self) -> None:
        """Free the model; what is known of it stays."""
        self._found = replace(self.found(), model=None)


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
        return self._begin(lambda abandoned: self.build((checkpoint,), abandoned), is_reload=False)

    def stage_received(self, path: str, weights_id: str, *, in_place: bool = False) -> StagedModel:
        checkpoint = Checkpoint(path, "safetensors", weights_id)
        return self._begin(lambda abandoned: self.build((checkpoint,), abandoned, in_place=in_place), is_reload=False)

    def overwrite(self, staged: StagedModel) -> StagedRead[bool]:
        assert staged.overwrite is not None, "staged beside the old weights"
        self._runner.replace_model(None)
        overwrite, device = staged.overwrite, self._device

        def run(_: threading.Event) -> bool:
            with device.packing():
                overwrite()
            return True

        return StagedRead(run, name="overwrite-weights")

    def parameters(self) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        tied_head = ("lm_head.weight",) if self._config.tie_word_embeddings else ()
        return dict(self._config.parameter_shapes()), IGNORED_SUFFIXES + tied_head

    def hash(self) -> StagedRead[dict[str, str]]:
        model, device = self._runner.model, self._device

        def run(abandoned: threading.Event) -> dict[str, str]:
            with device.packing():
                return checksums_of(model, device, abandoned)

        return StagedRead(run, name="hash-weights")

    def reload(self, *, accepts_changes: bool = False) -> StagedModel:
        kept, released = self._kept, self._loaded
        if kept is not None:
            return self._begin(lambda _: self._build_kept(kept), is_reload=True)
        return self._begin(
            lambda abandoned: self.build(
                tuple(layer.checkpoint for layer in released),
                abandoned,
                released=released,
                accepts_changes=accepts_changes,
            ),
            is_reload=True,
        )

    def swap(self, staged: StagedModel) -> None:
        self._put_in_place(staged)
        self._weights_id, self._end_ids = staged.weights_id, staged.end_ids
        self._kept = None
        self._loaded = visible_layers(staged.layers if staged.is_reload else (*self._loaded, *staged.layers))

    def _begin(self, build: Callable[[threading.Event], BuiltModel], *, is_reload: bool) -> StagedModel:
        def packed(abandoned: threading.Event) -> BuiltModel:
            with self._device.packing():
                return build(abandoned)

        return StagedModel(packed, is_reload=is_reload)

    def _put_in_place(self, staged: StagedModel) -> None:
        """Into the memory of the model in place if what steps launch is bound to it, else by taking its place."""
        model = staged.model()
        if not self._runner.has_model or not copy_decoder(self._runner.model, model, self._device):
            self._runner.replace_model(model)
            return
        del model
        staged.drop_model()
        threading.Thread(target=self._device.trim_memory, name="trim-memory", daemon=True).start()

    def release(self) -> int:
        stays = self._keeps_on_host and self._device.name == "cpu"
        if self._keeps_on_host:
            model = self._runner.model
            self._kept = model if stays else HostTensors(model, self._device)
        self._runner.replace_model(None)
        self._device.trim_memory()
        return 0 if stays else self._weights_bytes

    def values(self, name: str, num_values: int) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
        dtype, part = self.part(name, num_values)
        return (dtype, *self.join(name, num_values, [part]))

    def part(self, name: str, num_values: int) -> tuple[str, Floats]:
        num_rows = -(-num_values // math.prod(self._config.parameter_shapes()[name][1:]))
        first = self._device.to_host(self._runner.model.get_by_name(name), max_rows=num_rows)
        return first.format, first.to_float32()

    def join(self, name: str, num_values: int, parts: Sequence[Floats]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        whole = join(name, parts, self._config)
        return self._config.parameter_shapes()[name], tuple(whole.reshape(-1)[:num_values].tolist())

    def build(
        self,
        checkpoints: tuple[Checkpoint, ...],
        abandoned: threading.Event,
        *,
        released: tuple[Layer, ...] = (),
        accepts_changes: bool = False,
        in_place: bool = False,
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
        received_id = checkpoints[-1].weights_id
        has_changed = bool(released) and ids != [layer.content_id for layer in released]
        weights_id = self._weights_id if released and not has_changed else self._identity(ids, is_whole=is_whole)
        if received_id and not released:
            weights_id = received_id
        if has_changed and not accepts_changes:
            raise ChangedWeights(
                f"the files of the released weights have changed: weights_id {self._weights_id} was released, "
                f"{', '.join(checkpoint.path for checkpoint in checkpoints)} would give {weights_id}"
            )
        check_shapes(shapes, overlay, tied_head=self._config.tie_word_embeddings)
        share = ModelShare.of(self._device.ranks)
        overwrite = None
        for each in opened:
            if in_place and each.received is not None:
                each.received.use_files()  # they are read when this has ended
        if in_place and overlay.base is not None:
            if share.size > 1:
                raise ValueError("in_place is not supported with --tp-size: the ranks would overwrite at other moments")
            model, placed = overlay.base.model, self._placed(overlay)
            overwrite = partial(overwrite_decoder, model, placed, replaced=overlay.base.replaced)
        else:
            on_device = {name for each in opened if each.received for name in each.received.names_on_device}
            names = [name for name in overlay.names_to_read if name not in on_device]
            with ReadAhead(overlay, names) as ahead:
                model = build_decoder(self._config, self._placed(ahead), self._device, base=overlay.base)
        for each in opened:
            if each.received is None:
                check_unchanged(each.files, each.signature)
            else:
                each.received.check()
        return BuiltModel(
            model,
            weights_id=weights_id,
            layers=layers,
            num_tensors=overlay.num_new,
            end_ids=next((each.end_ids for each in reversed(opened) if each.end_ids is not None), ()),
            has_changed=has_changed,
            is_whole=is_whole,
            overwrite=overwrite,
        )

    def _placed(self, source: WeightSource) -> PlacedWeights:
        share = ModelShare.of(self._device.ranks)
        return PlacedWeights(share_of(source, self._config, share, form=self._form), self._device, self._form)

    def _open(self, checkpoint: Checkpoint, overlay: "Overlay") -> OpenedCheckpoint:
        """Add a checkpoint to the overlay, and hash its files."""
        self._check_local(checkpoint.path)
        files = resolve_model(checkpoint.path)
        signature = weights_signature(files)
        if checkpoint.weights_id:
            received = ReceivedWeights(files.safetensors, self._device, overlay.abandoned, form=self._form.dtype)
            overlay.add(received)
            names = frozenset(received.shapes()) & self._config.parameter_shapes().keys()
            layer = Layer(checkpoint, names, checkpoint.weights_id)
            return OpenedCheckpoint(layer, files, signature, self._end_ids, received)
        load_format = checkpoint.load_format
        config = read_checkpoint_config(files, self._config)
        stored = with_layout_of(files, self._config)
        source = open_weights(files, stored, load_format=load_format, seed=self._seed)
        overlay.add(source)
        content_id = weights_id_of(
            files,
            stored,
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
