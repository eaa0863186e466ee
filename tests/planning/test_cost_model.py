"""The cost model gives the times that serving engines were measured to take, and grows with what is computed."""

import json

import pytest

from headwater.planning.cost_model import CostModel
from headwater.planning.find_model import find_model, shape_from_config
from headwater.planning.hardware import HARDWARE, find_hardware
from headwater.planning.model_shape import MODELS
from headwater.planning.planned_engine import EnginePlan

LLAMA = MODELS["llama-3.1-8b"]
CONFIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def decode_s(costs: CostModel, rows: int, context: int) -> float:
    return costs.seconds(
        num_tokens=rows, num_rows=rows, num_samples=rows, num_read=rows * context, num_scores=rows * context
    )


def prefill_s(costs: CostModel, tokens: int, before: int = 0) -> float:
    scores = tokens * before + tokens * (tokens + 1) / 2
    return costs.seconds(num_tokens=tokens, num_rows=1, num_samples=1, num_read=before + tokens, num_scores=scores)


def test_an_8b_model_on_an_h100_takes_what_was_measured():
    """Other engines on one H100: 6.6 ms a token alone, 10.2 ms with 64 streams, 42,850 and 40,211 prompt tokens/s."""
    costs = CostModel(LLAMA, HARDWARE["h100"])
    assert decode_s(costs, 1, 1152) == pytest.approx(6.6e-3, rel=0.1)
    assert decode_s(costs, 64, 1152) == pytest.approx(10.24e-3, rel=0.1)
    assert 8192 / sum(prefill_s(costs, 1024) for _ in range(8)) == pytest.approx(42_850, rel=0.15)
    assert 4160 / (prefill_s(costs, 2080) + prefill_s(costs, 2080, 2080)) == pytest.approx(40_211, rel=0.1)


def test_two_h200_take_what_was_measured():
    """Decode of the 8B shape behind 1,024 tokens on one and on two H200 with NCCL, 29 Nov 2026 (in ms)."""
    for num_rows, measured_ms in ((1, (4.32, 3.44)), (64, (7.00, 5.52))):
        for tp_size, ms in zip((1, 2), measured_ms, strict=True):
            costs = CostModel(LLAMA, HARDWARE["h200"], tp_size=tp_size)
            assert decode_s(costs, num_rows, 1025) * 1e3 == pytest.approx(ms, rel=0.12), (num_rows, tp_size)
    for num_tokens, sum_us in ((1, 12.4), (64, 15.6), (128, 20.0)):  # 8 KiB, 512 KiB, 1 MiB
        costs = CostModel(LLAMA, HARDWARE["h200"], tp_size=2)
        assert costs.sums_s(num_tokens) / 65 * 1e6 == pytest.approx(sum_us, rel=0.05)


def test_ranks_share_what_is_computed_and_hold_repeated_kv_heads():
    alone, shared = (CostModel(LLAMA, HARDWARE["h200"], tp_size=size) for size in (1, 4))
    overhead_s = HARDWARE["h200"].step_overhead_s
    assert prefill_s(shared, 8192) - shared.sums_s(8192) - overhead_s == pytest.approx(
        (prefill_s(alone, 8192) - overhead_s) / 4
    )
    # the step of one token is its weights' and its KV's: of 16 ranks, two hold the same of 8 KV heads
    read_s = [decode_s(CostModel(LLAMA, HARDWARE["h200"], tp_size=n), 1, 1_000_000) for n in (8, 16)]
    kv_s = LLAMA.kv_bytes_per_token * 1_000_000 / 8 / HARDWARE["h200"].bytes_per_s
    assert read_s[1] > kv_s and read_s[0] - read_s[1] < 0.3e-3


def test_device_memory_grows_with_the_ranks_and_repeated_heads_take_of_it():
    pages = {size: EnginePlan(LLAMA, HARDWARE["h100"], tp_size=size).num_device_pages for size in (1, 2, 8, 16)}
    free = {size: 0.9 * 80e9 * size - LLAMA.total_weight_bytes for size in pages}
    page_bytes = LLAMA.kv_bytes_per_token * 16
    assert [pages[size] for size in (1, 2, 8)] == [int(free[size] / page_bytes) for size in (1, 2, 8)]
    assert pages[16] == int(free[16] / page_bytes / 2)


@pytest.mark.parametrize(
    ("hardware", "tp_size", "message"),
    [("h100", 3, "32 query heads"), ("h100", 0, "32 query heads"), ("cpu", 2, "all_reduce_bytes_per_s")],
)
def test_ranks_that_cannot_be_planned_are_refused(hardware, tp_size, message):
    with pytest.raises(ValueError, match=message):
        CostModel(LLAMA, HARDWARE[hardware], tp_size=tp_size)


def test_two_cores_take_what_was_measured():
    """SmolLM2: 13 ms a token alone, 21.7 ms a step of 16, 0.35 s for 512 prompt tokens, 1.18 s for 1,500."""
    costs = CostModel(MODELS["smollm2-135m"], HARDWARE["cpu"])
    assert decode_s(costs, 1, 96) == pytest.approx(13e-3, rel=0.1)
    assert decode_s(costs, 16, 96) == pytest.approx(21.7e-3, rel=0.15)
    assert prefill_s(costs, 512) == pytest.approx(0.345, rel=0.1)
    assert sum(prefill_s(costs, size, 512 * place) for place, size in enumerate((512, 512, 476))) == pytest.approx(
        1.18, rel=0.1
    )


@pytest.mark.parametrize("name", HARDWARE)
def test_more_work_takes_longer(name):
    costs = CostModel(LLAMA, HARDWARE[name])
    assert decode_s(costs, 1, 100) < decode_s(costs, 64, 100) < decode_s(costs, 64, 10_000)
    assert prefill_s(costs, 1000) < prefill_s(costs, 2000) < prefill_s(costs, 2000, before=50_000)


def test_a_model_takes_its_bytes():
    assert LLAMA.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert LLAMA.total_weight_bytes == pytest.approx(16.06e9, rel=0.01)
    assert MODELS["smollm2-135m"].total_weight_bytes == pytest.approx(2 * 134.5e6, rel=0.01)


def test_shapes_are_read_from_a_config(tmp_path):
    shape = shape_from_config(CONFIG, name="llama-3.1-8b")
    assert shape == LLAMA
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert find_model(str(tmp_path)) == find_model(str(tmp_path / "config.json"))
    assert find_model(str(tmp_path)).num_layer_weights == LLAMA.num_layer_weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_experts": 8}, "lacks the integer 'num_experts_per_tok'"),
        ({"n_routed_experts": 8}, "has n_routed_experts: the cost model knows experts as"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings must be an integer"),
    ],
)
def test_configs_that_cannot_be_planned_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        shape_from_config(CONFIG | change, name="x")


def test_a_step_reads_the_experts_that_its_tokens_choose():
    """30.5 billion weights are held, 3.3 billion multiply a token; a batch reads more of them, and at last all."""
    shape = MODELS["qwen3-30b-a3b"]
    assert shape.total_weight_bytes == pytest.approx(2 * 30.5e9, rel=0.01)
    assert shape.num_token_weights + 2 * shape.num_head_weights == pytest.approx(3.35e9, rel=0.01)
    assert shape.num_weights_read(1) == shape.num_token_weights
    hit = 128 * (1 - (120 / 128) ** 64)
    inner = 48 * 3 * 2048 * 768
    assert shape.num_weights_read(64) == pytest.approx(shape.num_token_weights + (hit - 8) * inner, rel=1e-6)
    assert shape.num_weights_read(4096) == pytest.approx(shape.num_layer_weights, rel=1e-6)
    costs, hardware = CostModel(shape, HARDWARE["h200"]), HARDWARE["h200"]
    one_s, many_s = (
        costs.seconds(num_tokens=num, num_rows=1, num_samples=0, num_read=0, num_scores=0) for num in (1, 4096)
    )
    assert shape.num_token_weights * 2 / hardware.bytes_per_s < one_s < 0.3 * many_s
    raw = {
        **CONFIG, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0],
    }  # fmt: skip
    found = shape_from_config(raw, name="x")
    assert (found.num_experts, found.experts_per_token, found.expert_size, found.num_dense_layers) == (4, 2, 8, 1)
    mixtral = shape_from_config({**CONFIG, "num_local_experts": 4, "num_experts_per_tok": 2}, name="x")
    assert (mixtral.expert_size, mixtral.num_dense_layers) == (CONFIG["intermediate_size"], 0)
    assert shape_from_config({**CONFIG, "num_experts": 0}, name="x") == shape_from_config(CONFIG, name="x")


def test_experts_in_mxfp4_take_17_bytes_for_32_weights():
    """gpt-oss-20b: 12.8 GiB. A decode reads 3.6 billion weights, of which 2.4 billion are of experts."""
    shape = MODELS["gpt-oss-20b"]
    assert shape.total_weight_bytes == pytest.approx(12.8 * 2**30, rel=0.01)
    experts = 24 * 4 * 3 * 2880 * 2880
    assert shape.weight_bytes_read(1) == pytest.approx((shape.num_token_weights - experts) * 2 + experts * 17 / 32)
    raw = {
        **CONFIG, "num_local_experts": 4, "num_experts_per_tok": 2, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    assert shape_from_config(raw, name="x").expert_bytes == 17 / 32


def test_null_is_the_same_as_nothing():
    names = ("num_key_value_heads", "head_dim", "max_position_embeddings", "torch_dtype", "tie_word_embeddings")
    without = {key: value for key, value in CONFIG.items() if key not in names}
    nulls = CONFIG | dict.fromkeys(names)
    assert shape_from_config(nulls, name="x") == shape_from_config(without, name="x")


def test_hardware_from_a_file_changes_a_preset(tmp_path):
    file = tmp_path / "b200.json"
    file.write_text('{"base": "h200", "bytes_per_s": 6e12, "overlap": 0.5}')
    found = find_hardware(str(file))
    assert (found.name, found.bytes_per_s, found.overlap) == ("b200", 6e12, 0.5)
    assert found.host_bytes_per_s == HARDWARE["h200"].host_bytes_per_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"base": "tpu"}', "base must be one of"),
        ('{"flops": 1}', "'flops' is not known"),
        ('{"bytes_per_s": 0}', "bytes_per_s of the hardware must be above 0"),
        ('{"overlap": 2}', "overlap of the hardware must be from 0 to 1"),
        ("[]", "hardware wrong.json"),
    ],
)
def test_wrong_hardware_files_are_refused(tmp_path, text, message):
    file = tmp_path / "wrong.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_hardware(str(file))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="hardware must be a JSON file or one of h100"):
        find_hardware("abacus")
    with pytest.raises(ValueError, match=r"model must be a config\.json"):
        find_model("gpt-9")
