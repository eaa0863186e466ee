"""LongRoPE's factors beside transformers: the long ones, and the short ones where the served context is small."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("torch")

from transformers import PreTrainedModel  # noqa: E402

from headwater.devices.cpu.device import CpuDevice  # noqa: E402
from headwater.execution.cpu_runner import CpuRunner  # noqa: E402
from headwater.models.checkpoint_config import read_checkpoint_config  # noqa: E402
from headwater.models.loader import LoadedModel, load_model, read_config, resolve_model  # noqa: E402
from tiny_models import VOCAB_SIZE, greedy_text, is_greedy_text, make_tiny_model  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "execution"))
from step_driver import StepDriver  # noqa: E402

ORIGINAL = 40
PROMPTS = [np.random.default_rng(4).integers(3, VOCAB_SIZE, length).tolist() for length in (3, 19, 30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("longrope")
    return folder, make_tiny_model("phi3-longrope", folder, original_max_position_embeddings=ORIGINAL)


def _load(folder: Path, max_context: int | None) -> LoadedModel:
    device = CpuDevice(num_threads=1)
    return load_model(resolve_model(str(folder)), device=device, dtype="float32", max_context=max_context)


def _texts(loaded: LoadedModel, num_outputs: int) -> list[list[int]]:
    runner = CpuRunner(
        loaded, CpuDevice(num_threads=1), layout=loaded.kv_layout(page_size=5), num_pages=60, max_running=3
    )
    driver = StepDriver(runner)
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(PROMPTS)]
    driver.run(requests, num_outputs=num_outputs, chunk=7)
    return [request.outputs for request in requests]


def test_a_context_within_the_original_one_has_the_short_factors(model: tuple[Path, PreTrainedModel]) -> None:
    """Every text of such a server is one that transformers embeds so, to its last token."""
    folder, reference = model
    expected = [greedy_text(reference, prompt, ORIGINAL - len(prompt)) for prompt in PROMPTS]
    found = _texts(_load(folder, ORIGINAL), num_outputs=ORIGINAL - len(PROMPTS[0]))
    for text, wanted in zip(found, expected, strict=True):
        assert text[: len(wanted)] == wanted
    assert len({token for text in expected for token in text}) > 12, "degenerate text would prove nothing"


@pytest.mark.parametrize("max_context", [ORIGINAL + 1, None])
def test_a_longer_context_has_the_long_factors(model: tuple[Path, PreTrainedModel], max_context: int | None) -> None:
    """Whole texts that are longer than the original context: transformers embeds all of their tokens so."""
    folder, reference = model
    found = _texts(_load(folder, max_context), num_outputs=60)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert is_greedy_text(reference, prompt, text)
    assert found != _texts(_load(folder, ORIGINAL), num_outputs=60), "the factors make no difference"


def test_the_factors_are_part_of_the_identity(model: tuple[Path, PreTrainedModel]) -> None:
    """A store must not give pages of the long factors to a server with the short ones."""
    folder, _ = model
    ids = [_load(folder, max_context).weights_id for max_context in (None, ORIGINAL + 1, ORIGINAL, ORIGINAL - 1)]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_a_server_with_the_short_factors_takes_new_weights(model: tuple[Path, PreTrainedModel]) -> None:
    files = resolve_model(str(model[0]))
    config = read_config(files)
    for served in (config, config.for_context(ORIGINAL)):
        found = read_checkpoint_config(files, served)
        assert found is not None and found.rope.freq_factors == served.rope.freq_factors
