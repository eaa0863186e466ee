"""Triton's interpreter, three times as quick: what it computes anew for every operation is computed once.

It looks up its language for every call of a function, and the type of every intermediate result.
"""

import functools
from typing import Any

VERSION = "3.9.0"  # of Triton, whose inner functions are replaced here; others take their time


@functools.cache
def hasten() -> None:
    """From now on, in this process. Here no kernel is ever compiled."""
    import triton

    if triton.__version__ != VERSION:
        return
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _patch_language_once(interpreter)
    _remember_types(core, interpreter)
    _skip_equal_shapes(TritonSemantic)
    # a sum that overflows has the same wrong bits here as on a card, and the test sees them
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _patch_language_once(interpreter: Any) -> None:
    patch = interpreter._patch_lang

    @functools.cache
    def patch_once(function: object) -> Any:
        patch(function)
        return interpreter._LangPatchScope()  # has nothing to undo

    interpreter._patch_lang = patch_once


def _remember_types(core: Any, interpreter: Any) -> None:
    make_block, np_dtype_of = core.block_type.__init__, interpreter._get_np_dtype
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    np_dtypes: dict[str, Any] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        found = blocks.get((element_ty.name, sizes))
        if found is None:
            make_block(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)  # one object, so that `is` compares
            found = blocks[element_ty.name, sizes] = self.__dict__
        self.__dict__ = dict(found)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in of_tensors:
            right(self, handle, type)
            of_tensors[sizes] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors[sizes]

    def np_dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype_of(type)
        return np_dtypes[name]

    right = core.tensor.__init__
    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
    interpreter._get_np_dtype = np_dtype
    equal = core.dtype.__eq__
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _skip_equal_shapes(semantic: Any) -> None:
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value


def exact_dots(patch: Any) -> None:
    """While pytest's monkeypatch holds: a row's product is the same at any place of its tile, as on a card.

    numpy's library sums the rows of one matrix in different orders.
    """
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
