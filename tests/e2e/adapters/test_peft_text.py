"""Text of LoRA adapters that PEFT made, against PEFT: eight in mixed batches, with chunks, prefix hits and a host tier.

In float32, token for token. The options are those that PEFT publishes: rank-stabilised scales, patterns, few modules.
"""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import peft  # noqa: E402
from tiered import write_byte_tokenizer  # noqa: E402

from headwater import Engine  # noqa: E402
from headwater.models.adapters import adapter_config  # noqa: E402
from tiny_models import ADAPTED, VOCAB_SIZE, is_greedy_text, make_tiny_model  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
NUM_OUTPUTS = 6
BASE = None
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 8},
    "few modules": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 64},
    "linear": {"target_modules": "all-linear"},
    "by expression": {"target_modules": r".*\.(o|gate|down)_proj"},
    "rank pattern": {"rank_pattern": {"k_proj": 3, "mlp.up_proj": 8}},
    "alpha pattern": {"alpha_pattern": {"down_proj": 48, "^model.layers.0.self_attn.o_proj": 4}, "use_rslora": True},
    "one layer": {"layers_to_transform": [1], "lora_alpha": 64},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peft")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str | None, Any]:
    """The model alone and with each adapter, computed by PEFT; the adapters are saved by it."""
    model = make_tiny_model("qwen3", folder / "model", num_layers=2)
    write_byte_tokenizer(folder / "model")
    found: dict[str | None, Any] = {BASE: model}
    for seed, (name, options) in enumerate(OPTIONS.items()):
        config = peft.LoraConfig(**{"r": 16, "lora_alpha": 32, "target_modules": list(ADAPTED), **options})
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if ".lora_" in parameter_name:
                    parameter.normal_(std=0.15)
        adapted.save_pretrained(folder / name)
        found[name] = adapted
    return found


@pytest.fixture(scope="module")
def engine(folder: Path, references: dict[str | None, Any]) -> Iterator[Engine]:
    """A device pool of fewer tokens than the conversations have, over a host tier."""
    paths = ",".join(f"{name}={folder / name}" for name in OPTIONS)
    with Engine(
        str(folder / "model"), dtype="float32", threads=1, lora_paths=paths, max_lora_rank=16, page_size=4,
        max_total_tokens=288, max_running_requests=16, chunked_prefill_size=16, enable_hierarchical_cache=True,
        hicache_ratio=4.0, hicache_restore_policy="always", log_level="warning",
    ) as engine:  # fmt: skip
        yield engine


def test_mixed_batches_have_the_text_of_peft(engine: Engine, references: dict[str | None, Any]) -> None:
    """Catches a scale or a module that is read otherwise, KV of one adapter under another, a torn chunk."""
    random = np.random.default_rng(0)
    names = [list(references)[index % len(references)] for index in range(16)]
    shared = random.integers(3, VOCAB_SIZE, 24).tolist()
    prompts = [shared + random.integers(3, VOCAB_SIZE, int(num)).tolist() for num in random.integers(1, 20, 16)]
    cached, num_alike = {"device": 0, "host": 0}, 0
    for _ in range(2):
        answers = engine.generate(
            input_ids=prompts,
            lora_path=names,
            sampling_params={"temperature": 0, "max_new_tokens": NUM_OUTPUTS, "ignore_eos": True},
        )
        for index, (name, answer) in enumerate(zip(names, answers, strict=True)):
            outputs = answer["output_ids"]
            fitting = [other for other in references if is_greedy_text(references[other], prompts[index], outputs)]
            assert name in fitting, f"not the text of {name}, but of {fitting}"
            num_alike += len(fitting) - 1
            for tier in cached:
                cached[tier] += answer["meta_info"]["cached_tokens_details"][tier]
            prompts[index] = [*prompts[index], *outputs, 7, 11]
    assert num_alike <= 2, "the adapters are too small to be told apart"
    assert min(cached.values()) > 0, cached


def test_every_option_of_peft_is_known() -> None:
    """An option that a new PEFT adds must be looked at, before an adapter with it is refused as unknown."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    known = adapter_config._HONOURED | adapter_config._OF_TRAINING | adapter_config._NEUTRAL.keys()
    assert fields <= known, fields - known


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_what_peft_saves_and_we_do_not_serve_is_refused_by_name(
    tmp_path: Path, references: dict[str | None, Any], engine: Engine, options: dict[str, Any], word: str
) -> None:
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})
    peft.get_peft_model(copy.deepcopy(references[BASE]), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=word):
        engine.load_lora_adapter("new", str(tmp_path / "adapter"))
