"""Pickles as PyTorch writes them, made without PyTorch."""

import io
import pickle
from typing import Any


class Named:
    """Pickled as the global `module.name`; called with `arguments` if given."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments


class Pickler(pickle._Pickler):  # type: ignore[name-defined]  # Python's own in Python: its writing can be changed
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Named):
            super().save(obj, save_persistent_id)
            return
        self.save(obj.module)
        self.save(obj.name)
        self.write(pickle.STACK_GLOBAL)
        if obj.arguments:
            self.save(obj.arguments if obj.arguments != ((),) else ())
            self.write(pickle.REDUCE)


def dumps(value: Any) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol=4).dump(value)
    return out.getvalue()


REDUCTIONS = "torch.multiprocessing.reductions"


def shared(name: bytes, num_bytes: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0):
    storage = Named(
        REDUCTIONS, "rebuild_storage_filename", Named("torch.storage", "UntypedStorage"), b"/sock", name, num_bytes
    )
    typed = Named(REDUCTIONS, "rebuild_typed_storage", storage, Named("torch", dtype))
    metadata = (offset, Named("torch", "Size", shape), strides, False)
    return Named(REDUCTIONS, "rebuild_tensor", Named("torch", "Tensor"), typed, metadata)
