"""A model that is loaded and served: its files, its weights, and what the control plane may change of it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from headwater.devices.device import Device
from headwater.execution.adapters.adapter_store import AdapterStore
from headwater.execution.runner import KvLifetime, Runner
from headwater.execution.weight_store import Checkpoint, WeightStore
from headwater.launch.config import ServerArgs
from headwater.launch.placement import Placement
from headwater.models.checkpoint_config import read_checkpoint_config
from headwater.models.config import ModelConfig
from headwater.models.loader import LoadedModel, ModelFiles, load_model, resolve_model
from headwater.scheduling.plan import StepHandle, StepPlan

_HUB_REFUSAL = "a hub id is fetched only by a server that was started with --allow-hub, or with a hub id as --model"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelInPlace:
    """The loaded model, and the files that it was loaded from."""

    files: ModelFiles
    checkpoint: Checkpoint  # the weights; they may be those of another checkpoint than the model's own
    loaded: LoadedModel
    end_ids: tuple[int, ...]  # tokens that end an answer according to such a checkpoint's files


class ServedModel:
    """A runner with its weights and KV memory, which the control plane may change (`engine.ports.ModelRunner`)."""

    def __init__(
        self, runner: Runner, *, weights: WeightStore, kv_memory: KvLifetime, adapters: AdapterStore | None = None
    ) -> None:
        self._runner = runner
        self.weights = weights
        self.kv_memory = kv_memory
        self.adapters = adapters

    def launch(self, plan: StepPlan) -> StepHandle:
        return self._runner.launch(plan)

    def recover(self) -> None:
        self._runner.recover()


def read_model(args: ServerArgs, placement: Placement, weights: tuple[str, str] | None) -> ModelInPlace:
    """Read the model. `weights`: path and format of the checkpoint that its tensors come from, if not its own."""
    assert args.model is not None, "the launcher resolves the default model"
    files = resolve_model(args.model)
    path, load_format = weights or (args.model, args.load_format)
    checkpoint = Checkpoint(path, load_format)  # type: ignore[arg-type]  # checked by the loader
    weight_files = None if weights is None else resolve_model(checkpoint.path)
    _log.info("reading %s", files.name)
    loaded = load_model(
        files,
        device=placement.device,
        dtype=args.dtype,
        quantization=args.quantization,
        load_format=checkpoint.load_format,
        seed=args.random_seed,
        weights=weight_files,
        cache=placement.layer_cache(args),
        max_context=args.context_length,
    )
    if loaded.config.rope.kind == "longrope":
        _log.info("LongRoPE: %s", _factors(loaded.config))
    own = None if weight_files is None else read_checkpoint_config(weight_files, loaded.config)
    return ModelInPlace(files, checkpoint, loaded, end_ids=() if own is None else own.eos_token_ids)


def _factors(config: ModelConfig) -> str:
    """Which factors all texts are computed with, and how to have the others."""
    original = config.rope.original_context
    if not config.rope.short_factors:
        return f"the short factors, for texts of up to {original} tokens"
    return f"the long factors for all texts; --context-length {original} or less takes the short ones"


def serve_model(args: ServerArgs, device: Device, model: ModelInPlace, runner: Runner) -> ServedModel:
    may_use_hub = args.allow_hub or not Path(model.files.name).expanduser().exists()  # the start used the hub as well
    weights = WeightStore(
        runner,
        model.loaded,
        device=device,
        checkpoint=model.checkpoint,
        seed=args.random_seed,
        hub_refusal=None if may_use_hub else _HUB_REFUSAL,
        keeps_on_host=args.keep_weights_on_host,
        end_ids=model.end_ids,
    )
    adapters = None
    if runner.adapters is not None:
        loaded, refusal = model.loaded, None if may_use_hub else _HUB_REFUSAL
        adapters = AdapterStore(
            runner.adapters, loaded.config, form=loaded.dtype, share=loaded.share, hub_refusal=refusal
        )
    return ServedModel(runner, weights=weights, kv_memory=KvLifetime(runner, device), adapters=adapters)
