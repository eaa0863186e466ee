"""Norms, rotary angles, selected rows, argmax and draws by the kernels, against their definition in numpy."""

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sanitized

from headwater.devices.cpu.attention_kernels import (
    ArgmaxJob,
    RmsNormJob,
    RotaryAnglesJob,
    SelectRowsJob,
)
from headwater.devices.cpu.draws import Draws, best_allowed, draw_tokens
from headwater.devices.cpu.kernel_library import SELECTED, TOKENS, KernelLibrary, Step
from headwater.devices.cpu.plain.draw import argmax, draw, log_noise, masked_argmax
from headwater.devices.cpu.plain.norm import rms_norm, rotary_angles
from headwater.devices.device import RotaryAngles
from headwater.devices.noise import noise_keys

pytestmark = pytest.mark.slow

SIZES = [1, 7, 8, 15, 16, 17, 31, 33, 576, 1000]


def _run(library: KernelLibrary, name: str, job: ctypes.Structure, **step: int) -> None:
    library.run(name, job, Step(**step))


def _addresses(**arrays: npt.NDArray[Any]) -> dict[str, int]:
    assert all(array.flags.c_contiguous for array in arrays.values())
    return {name: array.ctypes.data for name, array in arrays.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [TOKENS, SELECTED])
def test_rms_norm(library: KernelLibrary, size: int, rows: int) -> None:
    random = np.random.default_rng(size)
    x = random.normal(scale=3, size=(9, size)).astype(np.float32)
    weight = random.normal(1, 0.1, size=size).astype(np.float32)
    y = np.full_like(x, -1)
    num = {"num_tokens": 9, "num_selected": 5}
    _run(library, "rms_norm", RmsNormJob(**_addresses(x=x, weight=weight, y=y), size=size, eps=1e-5, rows=rows), **num)
    count = 9 if rows == TOKENS else 5
    np.testing.assert_allclose(y[:count], rms_norm(x[:count], weight, 1e-5), rtol=2e-6, atol=1e-7)
    assert (y[count:] == -1).all()


def test_rotary_angles_are_exact_up_to_a_context_of_a_million(library: KernelLibrary) -> None:
    """A float32 sine of a large angle is far off unless the angle is reduced with more digits."""
    positions = np.concatenate((np.arange(300), np.array([4095, 131071, 1_048_575]))).astype(np.int32)
    inv_freq = (1 / 500000 ** (np.arange(0, 24, 2) / 24)).astype(np.float32)
    cos, sin = np.empty((2, len(positions), 12), dtype=np.float32)
    job = RotaryAnglesJob(**_addresses(inv_freq=inv_freq, cos=cos, sin=sin), half=12, factor=1.5)
    _run(library, "rotary_angles", job, num_tokens=len(positions), positions=positions.ctypes.data)
    for found, expected in zip((cos, sin), rotary_angles(positions, RotaryAngles(inv_freq, 1.5)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-7, rtol=2e-7)


def test_pairs_that_are_not_rotated_have_no_factor(library: KernelLibrary) -> None:
    """Phi-4-mini rotates three quarters of a head, and multiplies these alone by LongRoPE's factor."""
    positions, inv_freq = np.array([0, 7], dtype=np.int32), np.array([1, 0.5, 0, 0], dtype=np.float32)
    cos, sin = np.empty((2, 2, 4), dtype=np.float32)
    job = RotaryAnglesJob(**_addresses(inv_freq=inv_freq, cos=cos, sin=sin), half=4, factor=1.5)
    _run(library, "rotary_angles", job, num_tokens=2, positions=positions.ctypes.data)
    plain = rotary_angles(positions, RotaryAngles(inv_freq, 1.5))
    for found in (cos, plain[0]):
        assert found[0].tolist() == [1.5, 1.5, 1, 1] and found[1, 2:].tolist() == [1, 1]
    for found in (sin, plain[1]):
        assert not found[0].any() and not found[1, 2:].any()


def test_select_rows(library: KernelLibrary) -> None:
    x = np.random.default_rng(0).normal(size=(20, 33)).astype(np.float32)
    selected = np.array([19, 0, 7, 7, 3, 12], dtype=np.int32)
    y = np.zeros((6, 33), dtype=np.float32)
    job = SelectRowsJob(**_addresses(x=x, y=y), size=33)
    _run(library, "select_rows", job, num_selected=6, selected=selected.ctypes.data)
    np.testing.assert_array_equal(y, x[selected])


@pytest.mark.parametrize("cols", SIZES)
def test_argmax_takes_the_first_and_reports_what_is_not_finite(library: KernelLibrary, cols: int) -> None:
    random = np.random.default_rng(cols)
    logits = random.integers(-3, 4, size=(60, cols)).astype(np.float32)  # ties everywhere
    logits[1::6, random.integers(cols)] = np.nan
    logits[2::6, random.integers(cols)] = -np.inf
    logits[3::6, random.integers(cols)] = np.inf
    logits[4] = np.nan
    tokens, is_finite = np.full(60, -1, dtype=np.int32), np.full(60, 7, dtype=np.uint8)
    job = ArgmaxJob(**_addresses(logits=logits, tokens=tokens, is_finite=is_finite), cols=cols, num_rows=60)
    _run(library, "argmax", job)
    expected, expected_finite = argmax(logits)
    np.testing.assert_array_equal(is_finite, expected_finite)
    np.testing.assert_array_equal(tokens, expected)
    tokens[:] = -1
    job.num_rows = -1
    _run(library, "argmax", job, num_selected=3)
    np.testing.assert_array_equal(tokens[:4], [*expected[:3], -1])


def _draws(logits: npt.NDArray[np.float32], keys: npt.NDArray[np.uint64], **options: Any) -> Draws:
    """Row after row of the logits, as often as there are keys; `options` are those of `plain.draw.draw`."""
    num = len(keys)
    return Draws(
        rows=np.arange(num, dtype=np.int32) % len(logits),
        keys=keys,
        temperatures=np.full(num, options.get("temperature", 1.0), dtype=np.float32),
        top_k=np.full(num, options.get("top_k", 0), dtype=np.int32),
        top_p=np.full(num, options.get("top_p", 1.0), dtype=np.float32),
        log_min_p=np.full(num, options.get("log_min_p", -np.inf), dtype=np.float32),
    )


def _assert_drawn(found: npt.NDArray[Any], logits: npt.NDArray[np.float32], keys: Any, **options: Any) -> None:
    assert ((found >= 0) & (found < logits.shape[1])).all()
    if not sanitized.LIBRARY:
        np.testing.assert_array_equal(found, _drawn(logits, keys, **options))


def _drawn(logits: npt.NDArray[np.float32], keys: npt.NDArray[np.uint64], **options: Any) -> list[int]:
    """By the definition."""
    return [draw(logits[index % len(logits)], int(key), **options) for index, key in enumerate(keys)]


@pytest.mark.parametrize("cols", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "log_min_p": float(np.log(0.05))},
        {"top_p": 0.9},
        {"top_k": 7},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.7},
        {"top_k": 2, "top_p": 0.4},
        {"temperature": 0.3, "top_p": 0.99, "log_min_p": float(np.log(0.2))},
        {"temperature": 40.0, "top_p": 0.9999},  # so flat that thousands of tokens lie in one bucket
    ],
)
def test_every_instruction_set_draws_the_tokens_of_the_definition(
    library: KernelLibrary, cols: int, options: dict[str, float]
) -> None:
    random = np.random.default_rng(cols)
    logits = random.normal(scale=2, size=(3, cols)).astype(np.float32)
    logits[:, ::5] = -np.inf
    logits[:, 0] = 0.5
    keys = noise_keys(random.integers(0, 2**63, size=100).astype(np.uint64), np.arange(100))
    found = draw_tokens(logits, _draws(logits, keys, **options), library=library, num_threads=2)
    _assert_drawn(found, logits, keys, **options)
    assert np.isfinite(logits[np.arange(100) % 3, found]).all()


@pytest.mark.parametrize("spread", [0.0, 0.001, 2.0, 9.0])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.2}, {"top_p": 0.9}, {"top_k": 6000}, {"top_k": 50, "top_p": 0.6}]
)
def test_draws_from_a_whole_vocabulary(library: KernelLibrary, spread: float, options: dict[str, float]) -> None:
    """Rows from a single peak to one where all tokens are alike, whose cut the kernel leaves to numpy.

    The kernel computes the noise of few tokens to the end; none that wins may be among the others.
    """
    num_tokens = 12_288 if sanitized.LIBRARY else 49_152
    logits = np.random.default_rng(1).normal(scale=spread, size=(2, num_tokens)).astype(np.float32) + 100
    keys = noise_keys(range(8), [0] * 8)
    found = draw_tokens(logits, _draws(logits, keys, **options), library=library, num_threads=2)
    _assert_drawn(found, logits, keys, **options)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5}, {"log_min_p": -1.0}])
def test_rows_that_are_not_finite_harm_no_other(library: KernelLibrary, options: dict[str, float]) -> None:
    logits = np.random.default_rng(1).normal(size=(6, 500)).astype(np.float32)
    logits[0, 3], logits[1, 4], logits[2], logits[3], logits[4] = np.nan, np.inf, np.nan, np.inf, -np.inf
    keys = noise_keys([1, 2, 3, 4, 5, 6], [0] * 6)
    found = draw_tokens(logits, _draws(logits, keys, **options), library=library, num_threads=2)
    assert ((found >= 0) & (found < 500)).all()
    assert found[5] == _drawn(logits[5:], keys[5:], **options)[0]


def test_draws_follow_the_distribution(library: KernelLibrary) -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.08, 0.02])
    logits = np.log(probabilities)[None].astype(np.float32)
    keys = noise_keys(np.arange(20_000).astype(np.uint64), np.arange(20_000))
    found = draw_tokens(logits, _draws(logits, keys), library=library, num_threads=2)
    shares = np.bincount(found, minlength=5) / len(found)
    assert np.abs(shares - probabilities).max() < 0.012
    draws = _draws(logits, keys[:2000], log_min_p=float(np.log(0.2)))
    found = draw_tokens(logits, draws, library=library, num_threads=2)
    assert set(found.tolist()) == {0, 1, 2}


def test_the_noise_of_the_definition_is_the_exponential_of_its_formula() -> None:
    """The series of log and -log(1 - u) against float64, small u included, which decide who wins."""
    tokens = np.arange(200_000, dtype=np.uint32)
    noise = np.exp(log_noise(tokens, 12345).astype(np.float64))
    assert abs(noise.mean() - 1) < 0.01 and abs(np.median(noise) - np.log(2)) < 0.01
    ranked = np.sort(noise)
    uniform = (np.arange(len(ranked)) + 0.5) / len(ranked)
    assert np.abs((1 - np.exp(-ranked)) - uniform).max() < 0.005


# --- masks ------------------------------------------------------------------------------------------


def _random_masks(num: int, cols: int, random: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Of every density, at least one token in each; bits behind the vocabulary are set, and must not matter."""
    words = random.integers(0, 2**32, size=(num, -(-cols // 32)), dtype=np.uint32)
    words[1::4] &= random.integers(0, 2**32, size=words[1::4].shape, dtype=np.uint32)
    words[2::4] = 0
    words[2::4, -1] = np.uint32(0xFFFFFFFF) << np.uint32(cols % 32) if cols % 32 else 0
    token = random.integers(cols, size=num)
    words[np.arange(num), token // 32] |= np.uint32(1) << (token % 32).astype(np.uint32)
    return words


@pytest.mark.parametrize("cols", [*SIZES, 2050])
def test_the_best_allowed_token_is_that_of_the_definition(library: KernelLibrary, cols: int) -> None:
    random = np.random.default_rng(cols)
    logits = random.integers(-3, 4, size=(12, cols)).astype(np.float32)  # ties everywhere
    logits[3, ::2], logits[4], logits[5] = -np.inf, -np.inf, np.nan
    masks = _random_masks(12, cols, random)
    rows, mask_rows = np.array([7, 0, 3, 4, 5, 11], dtype=np.int32), np.array([2, 1, 8, 3, 4, 6], dtype=np.int32)
    found = best_allowed(logits, rows, masks=masks, mask_rows=mask_rows, library=library, num_threads=2)
    expected = [masked_argmax(logits[row], masks[of]) for row, of in zip(rows, mask_rows, strict=True)]
    np.testing.assert_array_equal(found, expected)
    for token, of in zip(found.tolist(), mask_rows.tolist(), strict=True):
        assert masks[of, token // 32] >> np.uint32(token % 32) & 1


@pytest.mark.parametrize("cols", [*SIZES, 2050])
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"top_k": 7}, {"temperature": 0.6, "log_min_p": -2.0}, {"top_k": 40, "top_p": 0.6}]
)
def test_masked_draws_are_those_of_the_definition(
    library: KernelLibrary, cols: int, options: dict[str, float]
) -> None:
    random = np.random.default_rng(cols)
    num = 60
    logits = random.normal(scale=2, size=(3, cols)).astype(np.float32)
    logits[2] = -np.inf  # nothing but the mask is left
    keys = noise_keys(random.integers(0, 2**63, size=num).astype(np.uint64), np.arange(num))
    masks = _random_masks(20, cols, random)
    mask_rows = (random.integers(20, size=num)).astype(np.int32)
    mask_rows[::5] = -1
    mask_rows[2::3] = np.maximum(mask_rows[2::3], 0)  # rows of -infinity, which no request without a grammar has
    draws = replace(_draws(logits, keys, **options), masks=masks, mask_rows=mask_rows)
    found = draw_tokens(logits, draws, library=library, num_threads=2)
    for index, token in enumerate(found.tolist()):
        mask = None if mask_rows[index] < 0 else masks[mask_rows[index]]
        assert mask is None or mask[token // 32] >> np.uint32(token % 32) & 1
        if not sanitized.LIBRARY:
            assert token == draw(logits[index % 3], int(keys[index]), mask=mask, **options)
