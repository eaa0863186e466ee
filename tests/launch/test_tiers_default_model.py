"""The default model with pages on every tier: the text and the bytes are those of a server without tiers."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from headwater import Engine
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.host_memory import CpuPageCopier, HostMemory, ThreadCopy
from headwater.execution.cpu_runner import CpuRunner
from headwater.launch.default_model import ensure_default_model
from headwater.models.loader import load_model, resolve_model
from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.file.backend import FileBackend

sys.path += [str(Path(__file__).parents[1] / name) for name in ("storage", "execution")]
from redis_server import RedisServer
from step_driver import StepDriver
from storage_keys import Tenant

pytestmark = [pytest.mark.slow, pytest.mark.oracle]
NUM_PROMPTS = 4
PROMPT_TOKENS = 68  # 4 whole pages
NUM_OUTPUTS = 4
DEVICE_TOKENS = 16 * 5  # a prompt and its outputs: a quarter of the working set
SAMPLING = {"temperature": 0, "max_new_tokens": NUM_OUTPUTS, "ignore_eos": True}
TIERS = {"enable_hierarchical_cache": True, "hicache_storage_prefetch_policy": "wait_complete"}
FLOAT32 = {"dtype": "float32", "max_total_tokens": DEVICE_TOKENS, "max_running_requests": 1, "log_level": "warning"}


def prompt(number: int, num_tokens: int = PROMPT_TOKENS) -> list[int]:
    """Token ids that no other prompt begins with."""
    return np.random.default_rng(number).integers(1000, 40_000, num_tokens).tolist()


def ask(engine: Engine, number: int) -> tuple[list[int], dict[str, int]]:
    answer = engine.generate(input_ids=prompt(number), sampling_params=SAMPLING)
    return answer["output_ids"], answer["meta_info"]["cached_tokens_details"]


def wait_quiet(engine: Engine) -> None:
    give_up_s = time.monotonic() + 60
    while engine.get_state().blockers:
        assert time.monotonic() < give_up_s, engine.get_state().blockers
        time.sleep(0.01)


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """What a server without a cache says."""
    with Engine(**FLOAT32, disable_radix_cache=True) as engine:
        return [ask(engine, number)[0] for number in range(NUM_PROMPTS)]


def check_second_lap(engine: Engine, plain: list[list[int]], *, tier: str) -> None:
    """Every prompt twice; the second time each is found on `tier`, and says the same."""
    for _ in range(2):
        found = []
        for number in range(NUM_PROMPTS):
            tokens, details = ask(engine, number)
            assert tokens == plain[number], f"prompt {number}, found on {details}"
            found.append(details)
            wait_quiet(engine)
    assert min(details[tier] for details in found) == 64, found
    assert engine.get_state().counters["evicted_tokens"] >= 2 * DEVICE_TOKENS


def test_float32_text_is_the_same_from_the_host(plain: list[list[int]]) -> None:
    """A working set of four times the device and once the host."""
    with Engine(**FLOAT32, **TIERS, hicache_ratio=4.5) as engine:
        check_second_lap(engine, plain, tier="host")


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_float32_text_is_the_same_from_a_store(plain: list[list[int]], kind: str, tmp_path: Path) -> None:
    """A working set of four times the host, too."""
    redis = RedisServer() if kind == "redis" else None
    try:
        if redis is not None:
            redis.start()
            place = {"hicache_storage_url": redis.url}
        else:
            place = {"hicache_storage_dir": str(tmp_path)}
        with Engine(**FLOAT32, **TIERS, hicache_ratio=1.0, hicache_storage_backend=kind, **place) as engine:
            check_second_lap(engine, plain, tier="storage")
    finally:
        if redis is not None:
            redis.close()


# --- bfloat16 -----------------------------------------------------------------------------------------

NUM_LONG = 2
LONG_TOKENS = 208
NUM_FORCED = 96  # positions whose prediction is compared, after as many that come from a tier
BFLOAT16 = {"dtype": "bfloat16", "max_total_tokens": 224, "max_running_requests": 1, "log_level": "warning"}


def predictions(engine: Engine, number: int) -> tuple[list[int], dict[str, int]]:
    """The most probable token at each of the last positions of a long prompt, and where its beginning was found."""
    answer = engine.generate(
        input_ids=prompt(100 + number, LONG_TOKENS),
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=LONG_TOKENS - NUM_FORCED,
        top_logprobs_num=1,
    )
    meta = answer["meta_info"]
    tops = [entry[0][1] for entry in meta["input_top_logprobs"] if entry]
    return tops, meta["cached_tokens_details"]


def test_bfloat16_predictions_agree_on_top_of_pages_from_a_tier(tmp_path: Path) -> None:
    """Teacher-forced: the same tokens follow, and what the model would have said is compared at each."""
    with Engine(**BFLOAT16, disable_radix_cache=True) as engine:
        plain = [predictions(engine, number)[0] for number in range(NUM_LONG)]
    store = {"hicache_storage_backend": "file", "hicache_storage_dir": str(tmp_path)}
    with Engine(**BFLOAT16, **TIERS, **store, hicache_ratio=4.5) as engine:
        for number in range(NUM_LONG):
            predictions(engine, number)
            wait_quiet(engine)
        for tier in ("host", "storage"):
            num_same = num_all = 0
            for number in range(NUM_LONG):
                tops, details = predictions(engine, number)
                assert details[tier] >= 96, details
                num_same += sum(a == b for a, b in zip(tops, plain[number], strict=True))
                num_all += len(tops)
                wait_quiet(engine)
            assert num_all >= NUM_LONG * (NUM_FORCED - 1)
            assert num_same / num_all >= 0.99, f"{num_same} of {num_all} on {tier}"
            assert engine.flush_cache(tiers=["device", "host"], timeout=30).success


def wait_for(copy: ThreadCopy) -> None:
    give_up_s = time.monotonic() + 30
    while not copy.is_done():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
    assert not copy.has_failed


def test_bfloat16_pages_have_the_same_bytes_after_the_way_to_the_store_and_back(tmp_path: Path) -> None:
    device = CpuDevice()
    loaded = load_model(resolve_model(str(ensure_default_model())), device=device, dtype="bfloat16")
    driver = StepDriver(CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=16), num_pages=24, max_running=1))
    request = driver.add(prompt(0), slot=0)
    driver.run([request], num_outputs=1, chunk=64)
    kv = driver.runner.kv
    pages = np.array(request.pages[:4], dtype=np.int32)
    before = kv.pages[pages].copy()
    assert kv.layout.dtype == "bfloat16"
    assert (before != 0).any(axis=-1).all(), "pages that hold nothing would show nothing"
    host = HostMemory(num_pages=24, page_bytes=kv.layout.page_bytes)
    copier = CpuPageCopier(lambda: kv, host)
    away, back = np.arange(4, dtype=np.int32), np.arange(12, 16, dtype=np.int32)[::-1].copy()
    wait_for(copier.offload(pages, away))
    store = FileBackend(tmp_path, capacity_bytes=1 << 30)
    keys = Tenant().keys(store, 4)
    assert store.put(keys, [host.view(page) for page in away]) == [WriteStatus.STORED] * 4
    store.close()
    store = FileBackend(tmp_path, capacity_bytes=1 << 30)  # as after a restart
    assert store.get(keys, [host.view(page) for page in back]) == [ReadStatus.HIT] * 4
    store.close()
    kv.pages[:] = 0
    targets = np.arange(6, 10, dtype=np.int32)
    wait_for(copier.restore(back, targets))
    assert np.array_equal(kv.pages[targets], before)
