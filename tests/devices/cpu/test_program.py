"""Recorded CPU programs: arrays share memory only where that changes nothing, in whatever order and sizes."""

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from program_steps import step_of

from headwater.devices.cpu.kernel_library import SELECTED, TOKENS
from headwater.devices.cpu.program import Array, Program, StepArrays


def _sum(step: StepArrays, *, y: np.ndarray, number: int, **xs: np.ndarray) -> None:
    """y = number + the sums of the inputs' rows; an input that was overwritten shows in everything after."""
    y[:] = number + sum(x.sum(axis=1, keepdims=True) % 97 for x in xs.values())


def _append_sum(program: Program, y: Array, number: int, xs: Sequence[Array]) -> None:
    named = {f"x{i}": x for i, x in enumerate(xs)}
    program.append("sum", None, {"y": y, **named}, plain=lambda step, **arrays: _sum(step, number=number, **arrays))


OPS = st.lists(
    st.tuples(st.sampled_from([2, 3]), st.booleans(), st.lists(st.integers(0, 30), max_size=3), st.booleans()),
    min_size=1,
    max_size=25,
)


@given(ops=OPS, sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_shared_memory_changes_no_number(ops: list[tuple[int, bool, list[int], bool]], sizes: list[int]) -> None:
    """Random graphs against the same graph with memory of its own for each array; the steps shrink and grow."""
    program = Program(None, num_threads=1)
    arrays: list[Array] = []
    inputs: list[list[int]] = []
    for number, (width, is_in_place, picks, stays) in enumerate(ops):
        picked = sorted({pick % len(arrays) for pick in picks}) if arrays else []
        y = arrays[picked[-1]] if picked and is_in_place else program.array(TOKENS, width)
        inputs.append(picked)
        if stays:
            program.keep(y)
        arrays.append(y)
        _append_sum(program, y, number, [arrays[i] for i in picked if arrays[i] is not y])
    kept = [arrays[number] for number, (*_, stays) in enumerate(ops) if stays]
    for num_tokens in sizes:
        step = step_of(num_tokens, (0,))
        program.run(step)
        own = {array: np.zeros((num_tokens, array.width), dtype=np.float32) for array in arrays}
        for number, (y, picked) in enumerate(zip(arrays, inputs, strict=True)):
            xs = {str(i): own[arrays[i]] for i in picked if arrays[i] is not y}
            _sum(step, y=own[y], number=number, **xs)
        for array in kept:
            np.testing.assert_array_equal(program.view(array, step), own[array])


def test_arrays_of_a_deep_model_take_turns_in_the_same_memory() -> None:
    """Without sharing, a step's memory would grow with the number of layers."""
    program = Program(None, num_threads=1)
    x = program.array(TOKENS, 4)
    _append_sum(program, x, 1, [])
    for number in range(50):
        y = program.array(TOKENS, 4)
        _append_sum(program, y, number, [x])
        x = y
    program.run(step_of(16, (0,)))
    assert program.num_bytes < 16 * 4 * 4 * 3


def test_a_larger_step_keeps_what_stays() -> None:
    """The logits of a long prompt need more rows than the step before; its hidden states must still be there."""
    program = Program(None, num_threads=1)
    hidden, logits = program.keep(program.array(TOKENS, 3)), program.keep(program.array(SELECTED, 2))
    _append_sum(program, hidden, 5, [])
    program.append(
        "select", None, {"x": hidden, "y": logits},
        plain=lambda step, *, x, y: np.copyto(y, x[step.selected][:, :2]),
    )  # fmt: skip
    step, wide = step_of(20, (0,)), step_of(20, tuple(range(18)))
    program.run(step, end=1)
    program.run(wide, first=1)
    assert (program.view(hidden, wide) == 5).all()
    assert (program.view(logits, wide) == 5).all()


def test_a_larger_step_takes_no_other_memory_than_its_arrays() -> None:
    """Logits copied while the arrays grow are megabytes that the heap may keep; old arrays beside new ones as well."""
    program = Program(None, num_threads=1)
    logits = program.keep(program.array(SELECTED, 1 << 16))
    program.append("fill", None, {"y": logits}, plain=lambda step, *, y: y.fill(step.selected[0]))
    tracemalloc.start()
    try:
        for num_tokens in (16, 32, 48):  # rows of logits
            before = program.num_bytes
            tracemalloc.reset_peak()
            program.run(step_of(num_tokens, tuple(range(num_tokens))))
            assert program.num_bytes > before
            assert tracemalloc.get_traced_memory()[1] < program.num_bytes + 100_000
    finally:
        tracemalloc.stop()


def test_an_array_of_another_program_is_refused() -> None:
    one, other = Program(None, num_threads=1), Program(None, num_threads=1)
    with pytest.raises(AssertionError):
        _append_sum(one, one.array(TOKENS, 2), 1, [other.array(TOKENS, 2)])


def test_ops_may_fill_the_columns_of_one_array() -> None:
    """Queries, keys and values in formats of their own are products of their own."""
    program = Program(None, num_threads=1)
    y = program.keep(program.array(TOKENS, 5))
    for first, width in ((0, 3), (3, 2)):
        program.append("fill", None, {"y": y.columns(first, width)}, plain=lambda step, *, y, n=first: y.fill(n))
    step = step_of(4, (0,))
    program.run(step)
    np.testing.assert_array_equal(program.view(y, step), np.tile([0, 0, 0, 3, 3], (4, 1)))
