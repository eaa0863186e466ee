"""The compiled kernels of native/*.c as Python functions over tensors' addresses."""

import ctypes
import functools
import logging
import os
from typing import Any

from headwater.devices.cpu.native_build import library_path, missing_cpu_flags

logger = logging.getLogger(__name__)

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class AttentionJob(ctypes.Structure):
    """`Attention` of native/attention.h, field by field."""

    _fields_ = (
        ("query_starts", _POINTER),
        ("context_lens", _POINTER),
        ("page_tables", _POINTER),
        ("token_slots", _POINTER),
        ("chunks", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("kv", _POINTER),
        ("num_tokens", ctypes.c_int64),
        ("num_chunks", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("queries_per_chunk", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("norm_eps", _FLOAT),
        ("scale", _FLOAT),
        ("threads", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("qkv", _POINTER),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("out", _POINTER),
        ("works_per_claim", ctypes.c_int64),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "hw_linear": (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _INT, _POINTER, _INT),
    "hw_rms_norm": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _INT),
    "hw_attention": (ctypes.POINTER(AttentionJob),),
    "hw_queries_per_chunk": (_LONG,),
    "hw_draw": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT),
}


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The library. None, with the reason in the log, if it is switched off, not built or not for this CPU."""
    if os.environ.get("HEADWATER_NATIVE") == "0":
        logger.info("native CPU kernels not used: HEADWATER_NATIVE=0")
        return None
    if missing := missing_cpu_flags():
        logger.info("native CPU kernels not used: this CPU lacks %s", ", ".join(missing))
        return None
    path = library_path()
    if not path.exists():
        command = "python -m headwater.devices.cpu.native_build"
        logger.warning("native CPU kernels not built, computing slower: run %s", command)
        return None
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = _LONG if name == "hw_queries_per_chunk" else None
    return library
