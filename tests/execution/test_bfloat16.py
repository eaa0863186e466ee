"""Fewer bits on the default model: other shapes round differently, but hardly ever choose another token."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from step_driver import StepDriver

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.execution.cpu_runner import CpuRunner
from headwater.launch.default_model import ensure_default_model
from headwater.messages.generation import LogprobParams
from headwater.models.loader import LoadedModel, load_model, resolve_model
from headwater.tokenization.tokenizer import Tokenizer
from tiny_gguf import read_once

pytestmark = [pytest.mark.slow, pytest.mark.oracle]
NUM_PLAIN = 65  # tokens for numpy, which takes its time: one block of logits
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

TEXT = """The water of a river comes from rain, from melting snow and from springs. Where two rivers meet, the smaller
one is called a tributary. In 1855 a flood destroyed 17 bridges; three years later all of them had been rebuilt in
stone. Salmon swim up the river to the place where they were born, which may be 2,000 km from the sea. A mill needs
little more than a wheel, an axle and two stones. def area(r): return 3.14159 * r ** 2. Whoever walks upstream for
long enough arrives at the headwater, a place that is often no more than a wet meadow. """


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    with read_once():
        yield
    _loaded.cache_clear()
    _computed.cache_clear()


@pytest.fixture(scope="module")
def token_ids() -> tuple[int, ...]:
    return tuple(Tokenizer.load(ensure_default_model()).encode(TEXT * 2))


@functools.cache
def _loaded(dtype: str, use_kernels: bool) -> tuple[LoadedModel, CpuDevice]:
    device = CpuDevice(use_kernels=use_kernels)
    return load_model(resolve_model(str(ensure_default_model())), device=device, dtype=dtype), device


class Computed:
    """The KV of a text and what the model says of each position, computed in chunks beside another request."""

    def __init__(
        self,
        token_ids: list[int],
        *,
        dtype: str,
        chunk: int,
        use_kernels: bool = True,
        kv_dtype: str | None = None,
    ) -> None:
        loaded, device = _loaded(dtype, use_kernels)
        runner = CpuRunner(
            loaded, device, layout=loaded.kv_layout(page_size=16, dtype=kv_dtype), num_pages=40, max_running=2
        )
        driver = StepDriver(runner, seed=chunk)
        request = driver.add(token_ids, slot=0, logprobs=LogprobParams(top=1, prompt_start=0))
        other = driver.add(token_ids[:50], slot=1)
        driver.run([request, other], num_outputs=1, chunk=chunk)
        self.predictions = request.prompt_logprobs
        self.kv = driver.runner.kv.pages[request.pages]

    def agreement(self, other: "Computed", *, first: int | None = None) -> float:
        """The part of the positions (of the `first` ones) whose most probable token is the same."""
        pairs = list(zip(self.predictions[:first], other.predictions[:first], strict=True))
        return sum(a.top_ids == b.top_ids for a, b in pairs) / len(pairs)


@functools.cache
def _computed(token_ids: tuple[int, ...], *, dtype: str, use_kernels: bool = True, chunk: int = 10**6) -> Computed:
    """The same computation for all tests that compare with it."""
    return Computed(list(token_ids), dtype=dtype, chunk=chunk, use_kernels=use_kernels)


def test_bfloat16_chooses_as_float32_does(token_ids: tuple[int, ...]) -> None:
    """A kernel that sums in bfloat16, or rounds the residual, falls below."""
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    exact = _computed(token_ids, dtype="float32")
    assert len(exact.predictions) > 250
    assert _computed(token_ids, dtype="bfloat16").agreement(exact) >= 0.96


def test_bfloat16_in_numpy_chooses_as_float32_does(token_ids: tuple[int, ...]) -> None:
    exact = _computed(token_ids, dtype="float32")
    plain = _computed(token_ids[:NUM_PLAIN], dtype="bfloat16", use_kernels=False)
    assert plain.agreement(exact, first=NUM_PLAIN - 1) >= 0.96


def test_the_kernels_give_the_same_bits_in_any_chunks(token_ids: tuple[int, ...]) -> None:
    """Every sum runs in one order whatever else is in the step: text cannot depend on load or cache hits."""
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    whole = _computed(token_ids, dtype="bfloat16")
    for chunk in (3, 40):
        parts = Computed(list(token_ids), dtype="bfloat16", chunk=chunk)
        assert np.array_equal(parts.kv, whole.kv)
        assert parts.agreement(whole) == 1.0


def test_blocks_of_the_file_choose_as_their_values_in_float32_do(token_ids: tuple[int, ...]) -> None:
    """Weights are the file's in both; the activations of 4-bit products are rounded to 8 bits."""
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    exact = _computed(token_ids, dtype="float32")
    assert _computed(token_ids, dtype="auto").agreement(exact) >= 0.93


@pytest.mark.parametrize(("form", "least"), [("float16", 0.97), ("int8", 0.95), ("int4", 0.6)])
def test_other_forms_of_the_weights_choose_as_float32_does(
    token_ids: tuple[int, ...], form: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong scale falls far below. benchmarks/cpu_accuracy.py measures 5,000 tokens on every instruction set."""
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu_accuracy

    exact = [told.top_ids[0] for told in _computed(token_ids, dtype="float32").predictions]
    (found,) = cpu_accuracy.predictions(cpu_accuracy.FORMS[form], [np.array(token_ids, dtype=np.int32)])
    assert float((found[:-1] == exact).mean()) >= least


def test_chunks_hardly_change_the_choice_of_plain_numpy(token_ids: tuple[int, ...]) -> None:
    """Teacher-forced, at least 99 % of the tokens are the same whatever the chunks (docs/design.md, section 7)."""
    whole = _computed(token_ids[:NUM_PLAIN], dtype="bfloat16", use_kernels=False)
    parts = Computed(list(token_ids[:NUM_PLAIN]), dtype="bfloat16", use_kernels=False, chunk=40)
    assert parts.agreement(whole) >= 0.99


@pytest.mark.parametrize(("kv_dtype", "least"), [("float8_e4m3fn", 0.93), ("float8_e5m2", 0.88)], ids=["e4m3", "e5m2"])
def test_eight_bits_of_kv_choose_as_float32_does(
    token_ids: tuple[int, ...],
    kv_dtype: str,
    least: float,
    record_property: Callable[[str, str], None],
) -> None:
    """A head without its scale, or another's, falls far below. Every chunk reads those before it in 8 bits."""
    exact = _computed(token_ids, dtype="float32")
    agreement = Computed(list(token_ids), dtype="float32", chunk=64, kv_dtype=kv_dtype).agreement(exact)
    record_property("agreement", f"{agreement:.4f}")
    assert agreement >= least
