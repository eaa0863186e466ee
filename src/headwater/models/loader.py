"""Loads the model that a user names (a folder, a .gguf file or a hub id) onto a device."""

import logging
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from headwater.devices.device import ModelDevice
from headwater.devices.kv_memory import KVLayout
from headwater.models.config import ModelConfig, read_hf_config
from headwater.models.decoder import DecoderModel
from headwater.models.end_tokens import gguf_end_ids, vocabulary_end_ids
from headwater.models.experts.stacked import STACKED_TYPES, StackedExperts
from headwater.models.fields import Fields
from headwater.models.gguf_file import GGUFFile
from headwater.models.gguf_header import parts_of
from headwater.models.model_files import ModelFileError, is_there, open_regular, read_json_object
from headwater.models.quantised.quantization_config import read_quantisation
from headwater.models.quantised.weights import QUANTISED_TYPES, QuantisedWeights
from headwater.models.ranks.share import WHOLE, ModelShare, check_tp_size
from headwater.models.ranks.shared_weights import ShareOfWeights
from headwater.models.reading.build_decoder import build_decoder
from headwater.models.reading.file_hash import hash_of
from headwater.models.reading.read_decoder import read_decoder
from headwater.models.vocabulary import read_folder_vocabulary
from headwater.models.weights import (
    ROUNDED,
    DummyWeights,
    LayerCache,
    WeightForm,
    WeightSource,
    check_shapes,
)
from headwater.models.weights_gguf import GGUFWeights, read_gguf_config
from headwater.models.weights_safetensors import SafetensorsWeights, check_files, check_index, read_index

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Quantization = Literal["none", "int8", "int4", "fp8"]

Signature = tuple[tuple[str | int, ...], ...]  # path, device, inode, bytes, time of the last change

_BLOCK_FORMATS = {"int8": "Q8_0", "int4": "Q4_0", "fp8": ROUNDED}
_HASH_THREADS = 4
_SETTLED_NS = 2_000_000_000  # beyond the resolution of file times, on any file system
_TOKENIZER_FILES = ("*.json", "tokenizer.model")
_HUB_FILES = ("*.safetensors", "*.jinja", *_TOKENIZER_FILES)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model lies: a Hugging Face folder or a GGUF file."""

    name: str  # as the user gave it
    format: Literal["safetensors", "gguf"]
    folder: Path
    gguf: Path | None = None  # the file, for GGUF; the first one of a split file
    safetensors: tuple[Path, ...] = ()  # sorted by name; may be empty for load_format dummy


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, and the facts about it."""

    model: DecoderModel
    config: ModelConfig
    form: WeightForm
    weights_id: str  # 32 hex digits: a hash of the files' bytes, the config and the form; equal on all ranks
    weights_bytes: int  # of the parameters in their form, of this share
    load_s: float
    share: ModelShare = WHOLE

    @property
    def dtype(self) -> str:
        """The format of every number that is not in blocks."""
        return self.form.dtype

    @property
    def kv_heads(self) -> range:
        """The model's KV heads that this share has. Several ranks may have the same one."""
        return self.share.kv_heads(self.config)

    def kv_layout(self, *, page_size: int, dtype: str | None = None) -> KVLayout:
        """The layout of this share's pages, of keys and values of `dtype` (the model's own if not given)."""
        return self._kv_layout(len(self.kv_heads), page_size, dtype)

    def whole_kv_layout(self, *, page_size: int, dtype: str | None = None) -> KVLayout:
        """The layout that the pages have where one process computes the whole model."""
        return self._kv_layout(self.config.num_kv_heads, page_size, dtype)

    def _kv_layout(self, num_kv_heads: int, page_size: int, dtype: str | None) -> KVLayout:
        return KVLayout(
            num_layers=self.config.num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=self.config.head_dim,
            page_size=page_size,
            dtype=dtype or self.dtype,
        )


def resolve_model(model: str) -> ModelFiles:
    """Find the files of a folder, a .gguf file or a Hugging Face hub id (which is downloaded if need be).

    Raises ValueError, with a remedy, if there is no such model, and ModelFileError for a file that does not hold what
    its name promises.
    """
    path = _existing(model)
    if path is None:
        path = hub_folder(model)
    elif not path.is_dir():
        return ModelFiles(name=model, format="gguf", folder=path.parent, gguf=parts_of(path)[0])
    return ModelFiles(name=model, format="safetensors", folder=path, safetensors=_safetensors_in(path))


def read_config(files: ModelFiles) -> ModelConfig:
    """The model's config, without its weights."""
    return read_gguf_config(GGUFFile(files.gguf)) if files.gguf else read_hf_config(files.folder)


def tokenizer_end_ids(tokenizer: str) -> tuple[int, ...]:
    """The tokens that end an answer by a tokenizer's own files: a folder, a .gguf file or a hub id."""
    path = _existing(tokenizer) or hub_folder(tokenizer, patterns=_TOKENIZER_FILES)
    if path.is_dir():
        return vocabulary_end_ids(read_folder_vocabulary(path))
    fields = GGUFFile(path).fields("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    return gguf_end_ids(fields, vocab_size=len(fields.texts("tokenizer.ggml.tokens")))


def load_model(
    files: ModelFiles,
    *,
    device: ModelDevice,
    dtype: DtypeName = "auto",
    load_format: LoadFormat = "auto",
    quantization: Quantization = "none",
    seed: int = 0,
    weights: ModelFiles | None = None,
    cache: LayerCache | None = None,
    max_context: int | None = None,
) -> LoadedModel:
    """Read, check, convert and pack the weights. `seed` is for `load_format="dummy"` alone.

    `max_context`: no text will have more tokens, which may change the rotary embedding (RopeConfig.for_context).

    The tensors come from `weights` if given. The config is always that of `files`. With a `cache`, layers that were
    packed from the same files before are taken from there, and the files are not read. The device's rank decides which
    share of the model is loaded.

    Raises ValueError for an unknown dtype or format, a quantization that the device does not compute with, files that
    do not fit the format, an unknown architecture, and a tensor that is missing, unexpected or of another shape.
    """
    start_s = time.monotonic()
    form = _form_of(dtype, quantization, device)
    weights = weights or files
    _check_format(weights, load_format)
    config, share = read_config(files).for_context(max_context), ModelShare.of(device.ranks)
    check_tp_size(config, share.size)
    if config.experts is not None and form.quantised and form.quantised not in device.expert_formats:
        raise ValueError(
            f"quantization {quantization!r} does not go with experts on device {device.name!r}: they would stay plain"
        )
    before = weights_signature(weights)
    stored_config = config if weights is files else with_layout_of(weights, config)
    if cache is not None:
        key = _cache_key(weights, stored_config, form=form, load_format=load_format, share=share)
        stored = None if key is None else cache.open(key)
        if stored is not None:
            model = build_decoder(config, stored, device)
            check_unchanged(weights, before)
            return _loaded(model, form, stored.weights_id, num_bytes=stored.num_bytes, start_s=start_s)
    source = open_weights(weights, stored_config, load_format=load_format, seed=seed)
    check_shapes(config.parameter_shapes(), source, tied_head=config.tie_word_embeddings)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-id") as pool:
        weights_id = pool.submit(
            weights_id_of,
            weights,
            stored_config,
            form=form,
            load_format=load_format,
            seed=seed,
            device=device.name,
            num_threads=_HASH_THREADS,
        )
        num_bytes = sum(int(stamp[3]) for stamp in before if len(stamp) > 1)
        own = share_of(source, config, share, form=form)
        model, placed = read_decoder(own, config, device, form=form, num_bytes=num_bytes)
        loaded = _loaded(model, form, weights_id.result(), num_bytes=placed.num_bytes, start_s=start_s)
    check_unchanged(weights, before)
    if cache is not None and key is not None:
        cache.store(key, placed.parts, weights_id=loaded.weights_id, num_bytes=placed.num_bytes)
    return loaded


def share_of(source: WeightSource, config: ModelConfig, share: ModelShare, *, form: WeightForm) -> WeightSource:
    """The tensors of a whole source as a rank loads them."""
    return source if share.size == 1 else ShareOfWeights(source, config, share, kept=form.kept)


def _loaded(model: DecoderModel, form: WeightForm, weights_id: str, *, num_bytes: int, start_s: float) -> LoadedModel:
    load_s = time.monotonic() - start_s
    logger.info("loaded the weights (%s, %s) in %.1f s", model.config.architecture, form.dtype, load_s)
    return LoadedModel(model, model.config, form, weights_id, weights_bytes=num_bytes, load_s=load_s, share=model.share)


def with_layout_of(files: ModelFiles, config: ModelConfig) -> ModelConfig:
    """The config, with the layout of quantised weights that the files' own config.json names, if there is one."""
    path = files.folder / "config.json"
    if files.gguf is not None or not is_there(path):
        return config
    return replace(config, quantisation=read_quantisation(Fields(read_json_object(path), source=str(path))))


def open_weights(files: ModelFiles, config: ModelConfig, *, load_format: LoadFormat, seed: int) -> WeightSource:
    """The named tensors of `files` for a model of `config`. The files need no config of their own.

    Raises ValueError for a format that is unknown or does not fit the files, and for a folder that lacks tensors
    its own index names.
    """
    _check_format(files, load_format)
    if load_format == "dummy":
        return DummyWeights(config.parameter_shapes(), seed=seed)
    if files.gguf:
        return GGUFWeights(GGUFFile(files.gguf), config)
    if not files.safetensors:
        raise ModelFileError(
            files.folder,
            "has no .safetensors files; other formats (.bin, .pt) can run code and are not read",
        )
    check_files(files.folder)
    if config.experts is not None and config.experts.is_stacked:
        weights = SafetensorsWeights(files.safetensors, dtypes=STACKED_TYPES)
        check_index(files.folder, weights)
        return StackedExperts(weights, config.experts, num_layers=config.num_layers)
    if config.quantisation is None:
        weights = SafetensorsWeights(files.safetensors)
        check_index(files.folder, weights)
        return weights
    weights = SafetensorsWeights(files.safetensors, dtypes=QUANTISED_TYPES)
    check_index(files.folder, weights)
    return QuantisedWeights(weights, config.quantisation)


def weights_id_of(
    files: ModelFiles,
    config: ModelConfig,
    *,
    form: WeightForm,
    load_format: LoadFormat,
    seed: int,
    device: str,
    num_threads: int = 1,
) -> str:
    """Identity of weights: a hash of the files' bytes, the config and the form; 32 hex digits.

    For dummy weights it is a hash of the seed, the config, the form and the name of the `device`.
    """
    is_dummy = load_format == "dummy"
    # "torch." keeps the identity that older versions gave, and with it the pages of their stores
    parts = [repr(config), f"torch.{form.dtype}", f"random {seed} {device}" if is_dummy else ""]
    if files.format == "gguf" and form.kept and not is_dummy:
        parts.append(f"blocks of {' '.join(sorted(form.kept))} as they are")
    if config.quantisation is not None and not is_dummy:
        kept = " ".join(sorted(form.kept)) or "none"
        parts.append(f"{config.quantisation!r}, of which {kept} are kept")
    if form.quantised:
        parts.append(f"matrices in blocks of {form.quantised}")
    return hash_of(parts, [] if is_dummy else _weight_files(files), num_threads=num_threads)


def weights_signature(files: ModelFiles) -> Signature:
    """A value that changes when a file of the weights is written to or replaced."""
    return tuple((str(path), *_stamp(path)) for path in _weight_files(files))


def _cache_key(
    files: ModelFiles, config: ModelConfig, *, form: WeightForm, load_format: LoadFormat, share: ModelShare
) -> str | None:
    """What decides how the weights are packed; None if a change of the files might go unnoticed.

    A file that was written within the last seconds may be written again with the same time.
    """
    if load_format == "dummy":
        return None
    stamps = []
    for path in _weight_files(files):
        found = os.stat(path)
        if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED_NS:
            return None
        stamps.append((str(path.absolute()), *_stamp(path), found.st_ctime_ns))
    of_ranks = () if share.size == 1 else (f"rank {share.rank} of {share.size}",)
    layout = () if config.quantisation is None else (repr(config.quantisation),)
    return "\n".join((repr(config), *layout, form.dtype, *sorted(form.kept), form.quantised, repr(stamps), *of_ranks))


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()  # reading the file reports what is wrong
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def check_unchanged(files: ModelFiles, before: Signature) -> None:
    """Raise ModelFileError if a file of the weights has changed: its bytes and their hash may not agree."""
    for was, now in zip(before, weights_signature(files), strict=True):
        if was != now:
            raise ModelFileError(str(was[0]), "changed while it was read")


def _check_format(files: ModelFiles, load_format: LoadFormat) -> None:
    if load_format not in get_args(LoadFormat):
        raise ValueError(f"load_format must be one of {', '.join(get_args(LoadFormat))}, found {load_format!r}")
    if load_format in ("safetensors", "gguf") and load_format != files.format:
        raise ValueError(f"load_format {load_format!r} does not fit model {files.name!r}: it is {files.format}")


def _form_of(dtype: DtypeName, quantization: Quantization, device: ModelDevice) -> WeightForm:
    """auto: blocks as they are where the device can. A dtype that is named holds for all that is not quantised here."""
    if dtype not in get_args(DtypeName):
        raise ValueError(f"dtype must be one of {', '.join(get_args(DtypeName))}, found {dtype!r}")
    kept = device.block_formats | device.expert_formats
    plain = WeightForm(device.auto_dtype(), kept) if dtype == "auto" else WeightForm(dtype)
    if quantization == "none":
        return plain
    if quantization not in _BLOCK_FORMATS:
        raise ValueError(f"quantization must be one of {', '.join(get_args(Quantization))}, found {quantization!r}")
    form = _BLOCK_FORMATS[quantization]
    if form not in device.block_formats:
        raise ValueError(
            f"quantization {quantization!r} is not supported here: device {device.name!r} computes with "
            f"{', '.join(sorted(device.block_formats)) or 'plain numbers alone'}"
        )
    return WeightForm(plain.dtype, plain.kept | {form}, quantised=form)


def _existing(model: str) -> Path | None:
    """The folder or .gguf file that `model` names; None if there is none (it may be a hub id)."""
    try:
        path = Path(model).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if is_there(Path(model)):
            raise ModelFileError(model, "is a link that leads nowhere") from None
        return None
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelFileError(model, f"cannot be opened ({reason})") from None
    is_gguf = path.suffix == ".gguf"
    if stat.S_ISDIR(mode) and not is_gguf:
        return path
    if not is_gguf:
        raise ValueError(f"model {model!r} is a file but no .gguf file; give a .gguf file or a model folder")
    open_regular(path).close()
    return path


def _safetensors_in(folder: Path) -> tuple[Path, ...]:
    """The weight files of a folder: those that its index names, else all. `consolidated*` is Mistral's second copy."""
    index = read_index(folder)
    if index is not None:
        return tuple(folder / name for name in sorted(set(index.values())))
    return tuple(sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")))


def hub_folder(model: str, *, patterns: tuple[str, ...] = _HUB_FILES) -> Path:
    """The files of a hub id that match `patterns`, downloaded if need be. ValueError if there are none."""
    from huggingface_hub import snapshot_download  # slow to import, and most models are local
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    looks_like_path = model.startswith((".", "/", "~")) or model.endswith(".gguf")
    if looks_like_path or model.count("/") > 1:
        raise ValueError(f"model {model!r} does not exist: there is no such folder or .gguf file")
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ValueError(f"model {model!r} is neither a folder, a .gguf file nor a hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {model!r} is no local folder or .gguf file and could not be downloaded from the hub "
            f"({type(error).__name__}). Check the name and the network, or give the path of a folder with "
            f"config.json and .safetensors files, or of a .gguf file"
        ) from error


def _weight_files(files: ModelFiles) -> list[Path]:
    return list(parts_of(files.gguf) if files.gguf else files.safetensors)


