"""Reads `quantization_config` of a config.json. What is not understood is refused by name and value.

The keys are those that the publishers' tools write: GPTQ (AutoGPTQ, GPTQModel), AWQ (AutoAWQ), float8 as DeepSeek and
Qwen publish it, compressed-tensors (LLM Compressor), and MXFP4 (gpt-oss).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from headwater.models.fields import Fields
from headwater.models.model_files import ModelFileError, without_nulls
from headwater.models.quantised.scheme import Quantisation, Scheme

_LINEAR = ("Linear",)
# how the numbers were found, who did it and which kernels they had in mind: nothing of it changes the numbers
_HISTORY = frozenset(
    "quant_method method damp_percent damp_auto_increment static_groups true_sequential model_name_or_path "
    "model_file_base_name model_seqlen tokenizer dataset batch_size block_name_to_quantize "
    "module_name_preceding_first_block cache_block_outputs pad_token_id max_input_length meta backend exllama_config "
    "use_exllama use_cuda_fp16 disable_exllama cache_examples_on_gpu mse quantizer do_fuse fuse_max_seq_len "
    "modules_to_fuse act_group_aware modules_in_block_to_quantize hyb_act lm_head".split()
)
_BITS = {"gptq": (4, 8), "awq": (4,)}


def read_quantisation(fields: Fields) -> Quantisation | None:
    """The layout of a model's quantised matrices; None if config.json names none.

    ModelFileError, with parameter and value, for a method, parameter or value that is not served.
    """
    if not fields.raw("quantization_config"):
        return None
    raw = fields.inner("quantization_config")
    inner = _Parameters({key: raw.raw(key) for key in raw}, source=fields.source)
    method = inner.text("quant_method")
    read = _METHODS.get(method)
    if read is None:
        raise inner.refuse_value("quant_method", f"only {', '.join(sorted(_METHODS))}")
    return read(inner)


class _Parameters(Fields):
    """The members of `quantization_config`, or of an object in it at `path`."""

    def __init__(self, values: Mapping[str, Any], *, source: str, path: str = "quantization_config") -> None:
        super().__init__(without_nulls(values), source=source)
        self._path = path

    def refuse(self, reason: str) -> ModelFileError:
        return ModelFileError(self.source, f"{self._path}{' ' if reason.startswith('lacks') else '.'}{reason}")

    def refuse_value(self, key: str, served: str) -> ModelFileError:
        return self.refuse(f"{key} {self.raw(key)!r} is not supported, {served}")

    def child(self, key: str) -> "_Parameters":
        found = self.inner(key)
        values = {each: found.raw(each) for each in found}
        return _Parameters(values, source=self.source, path=f"{self._path}.{key}")

    def require(self, key: str, *served: object, default: object = None) -> Any:
        """The value, which must be one of `served`."""
        value = self.raw(key)
        value = default if value is None else value
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in served):
            raise self.refuse(f"{key} {value!r} is not supported, only {' or '.join(map(repr, served))}")
        return value

    def only(self, known: Iterable[str]) -> None:
        """Refuse any other key."""
        names = set(known)
        for key in self:
            if key not in names:
                raise self.refuse(f"{key} {self.raw(key)!r} is not known: without it text could be wrong")


def _gptq(fields: _Parameters) -> Quantisation:
    fields.only(
        _HISTORY
        | {"bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "pack_dtype", "is_marlin_format"}
        | {"modules_to_not_convert", "dynamic"}
    )
    fields.require("is_marlin_format", False, default=False)
    fields.require("pack_dtype", "int32", default="int32")
    if fields.raw("dynamic"):
        raise fields.refuse_value("dynamic", "only one layout for all modules")
    form = fields.require("checkpoint_format", "gptq", "gptq_v2", default=fields.raw("format") or "gptq")
    scheme = Scheme(
        "gptq",
        bits=fields.require("bits", *_BITS["gptq"]),
        tile=(1, _group_size(fields)),
        is_symmetric=fields.flag("sym", True),
        zero_offset=1 if form == "gptq" else 0,
        has_order=fields.flag("desc_act", False),
    )
    return Quantisation("gptq", ((_LINEAR, scheme),), tuple(fields.texts("modules_to_not_convert")))


def _awq(fields: _Parameters) -> Quantisation:
    fields.only(
        _HISTORY | {"bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "modules_to_not_convert"}
    )
    version = fields.text("version", "gemm")
    if version.lower() != "gemm":
        raise fields.refuse_value("version", "only 'gemm'")
    fields.require("zero_point", True, default=True)
    key = "bits" if "bits" in fields else "w_bit"
    size_key = "group_size" if "group_size" in fields else "q_group_size"
    scheme = Scheme(
        "awq", bits=fields.require(key, *_BITS["awq"]), tile=(1, _group_size(fields, size_key)), is_symmetric=False
    )
    return Quantisation("awq", ((_LINEAR, scheme),), tuple(fields.texts("modules_to_not_convert")))


def _float8(fields: _Parameters) -> Quantisation:
    fields.only(
        {"quant_method", "activation_scheme", "fmt", "weight_block_size", "scale_fmt", "kv_cache_scheme"}
        | {"modules_to_not_convert", "ignored_layers", "dequantize"}
    )
    fields.require("fmt", "e4m3", default="e4m3")
    fields.require("activation_scheme", "dynamic", "static", default="dynamic")
    fields.require("scale_fmt", "ue8m0", "float", default="float")
    block = fields.raw("weight_block_size")
    if block is None:
        scheme = Scheme("float8", 8, tile=(0, 0))
    else:
        scheme = Scheme("float8", 8, tile=_block(fields, "weight_block_size"), scale_name="weight_scale_inv")
    ignored = (*fields.texts("modules_to_not_convert"), *fields.texts("ignored_layers"))
    return Quantisation("fp8", ((_LINEAR, scheme),), ignored, has_kv_scales="kv_cache_scheme" in fields)


def _compressed_tensors(fields: _Parameters) -> Quantisation:
    fields.only(
        {"quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status", "version"}
        | {"sparsity_config", "transform_config", "global_compression_ratio"}
    )
    fields.require("quantization_status", "compressed", default="compressed")
    for key in ("sparsity_config", "transform_config"):
        found = fields.raw(key)
        is_dense = isinstance(found, Mapping) and found.get("format") == "dense"
        if found and not is_dense:
            raise fields.refuse_value(key, "only dense weights without transforms")
    groups = fields.child("config_groups")
    if not list(groups):
        raise fields.refuse("config_groups is empty: it must name what is quantised")
    schemes = tuple(_group(groups.child(name), fields.raw("format")) for name in groups)
    ignored = tuple(fields.texts("ignore"))
    for target in (*ignored, *(target for targets, _ in schemes for target in targets)):
        _check_expression(fields, target)
    kv = "kv_cache_scheme" in fields
    return Quantisation("compressed-tensors", schemes, ignored, by_part=False, has_kv_scales=kv)


def _group(group: _Parameters, format_of_all: object) -> tuple[tuple[str, ...], Scheme]:
    """The targets and the scheme of one of `config_groups`. Activations are not quantised here, whatever it says."""
    group.only(("targets", "weights", "input_activations", "output_activations", "format"))
    if group.raw("output_activations"):
        raise group.refuse_value("output_activations", "only null")
    form = group.raw("format") or format_of_all
    weights = group.child("weights")
    kind = weights.text("type", "int")
    served = {("float-quantized", "float"): "float8", ("naive-quantized", "float"): "float8",
              ("int-quantized", "int"): "int8", ("naive-quantized", "int"): "int8",
              ("pack-quantized", "int"): "packed"}  # fmt: skip
    layout = served.get((str(form), kind))
    if layout is None:
        raise group.refuse(
            f"weights.type {kind!r} in format {form!r} is not supported, only float-quantized, int-quantized and "
            "pack-quantized"
        )
    bits = weights.require("num_bits", *((4, 8) if layout == "packed" else (8,)))
    if weights.raw("dynamic"):
        raise weights.refuse_value("dynamic", "only false")
    is_symmetric = weights.flag("symmetric", True)
    if layout == "float8" and not is_symmetric:
        raise weights.refuse_value("symmetric", "only true")
    targets = tuple(group.texts("targets"))
    strategies = ("group", "channel") if layout == "packed" else ("tensor", "channel", "block")
    tile = _strategy_tile(weights, allowed=strategies)
    order = weights.raw("actorder")
    has_order = order in ("group", "dynamic") or (isinstance(order, bool) and order)
    if order is not None and not has_order and order not in ("weight", "static", False):
        raise weights.refuse_value("actorder", "only 'group', 'weight' or null")
    scheme = Scheme(layout, bits, tile=tile, is_symmetric=is_symmetric, has_order=has_order)  # type: ignore[arg-type]
    return targets, scheme


def _strategy_tile(weights: _Parameters, *, allowed: tuple[str, ...]) -> tuple[int, int]:
    strategy = weights.require("strategy", *allowed, default="group" if weights.raw("group_size") else "tensor")
    if strategy == "group":
        return (1, weights.integer("group_size"))
    if strategy == "block":
        return _block(weights, "block_structure")
    return (1, 0) if strategy == "channel" else (0, 0)


def _group_size(fields: _Parameters, key: str = "group_size") -> int:
    """Inputs that share a scale; 0 for all of a row, which files call -1."""
    size = fields.integer(key, low=-1)
    if size == 0 or (size > 0 and size % 8):
        raise fields.refuse_value(key, "only -1 and multiples of 8")
    return 0 if size == -1 else size


def _block(fields: _Parameters, key: str) -> tuple[int, int]:
    found = fields.raw(key)
    is_pair = isinstance(found, list) and len(found) == 2
    if not is_pair or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in found):
        raise fields.refuse(f"{key} must be two sizes like [128, 128], found {found!r}")
    return (found[0], found[1])


def _check_expression(fields: _Parameters, target: str) -> None:
    if not target.startswith("re:"):
        return
    try:
        re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise fields.refuse(f"targets and ignore hold {target!r}, which is no regular expression ({error})") from None


def _mxfp4(fields: _Parameters) -> Quantisation:
    """Of stacked experts (models/experts/stacked.py), whatever else is not to be converted."""
    fields.only({"quant_method", "modules_to_not_convert", "dequantize"})
    scheme = Scheme("mxfp4", 4, tile=(1, 32))
    return Quantisation("mxfp4", (((r"re:.*\.experts\.",), scheme),))


_METHODS = {"gptq": _gptq, "awq": _awq, "fp8": _float8, "compressed-tensors": _compressed_tensors, "mxfp4": _mxfp4}
