"""/metrics as the endpoint picker of llm-d and of the gateway API reads it, by the rules of its source.

A metric is found by its exact name, the first series with the newest time stamp counts, and sizes are labels or values
that must be integers. The names are those of `defaultEngineConfigs`, which published configurations leave as they are:
their `core-metrics-extractor` has no parameters (llm-d, guides/precise-prefix-cache-routing/router/*.values.yaml at
076e65d and a874822).

- llm-d-inference-scheduler at 520af47: pkg/epp/framework/plugins/datalayer/extractor/metrics
- llm-d-router at 08cbacc, its later name: the same folder. SGLang's sizes are gauges there.
- gateway-api-inference-extension at 84436a9, docs/proposals/003-model-server-protocol: the names of signals alone
"""

import msgspec
import pytest
from api_under_test import api
from prometheus_client.parser import text_string_to_metric_families

from headwater.messages.state import EngineState, GetState
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
ENGINES = {  # its defaultEngineConfigs: waiting, running, share of the cache, sizes and their labels
    "vllm": (
        ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"),
        ("vllm:cache_config_info", "block_size", "num_gpu_blocks"),
    ),
    "sglang": (
        ("sglang:num_queue_reqs", "sglang:num_running_reqs", "sglang:token_usage"),
        ("sglang:cache_config_info", "page_size", "num_pages"),
    ),
}
SIZES = {"sglang": ("sglang:page_size", "sglang:num_pages")}  # as gauges: llm-d-router at 08cbacc


@pytest.mark.parametrize("kind", list(ENGINES))
async def test_the_picker_finds_load_and_sizes_by_its_default_names(engine: ScriptedEngine, kind: str) -> None:
    names, (sizes, *labels) = ENGINES[kind]
    idle = engine._state  # the scripted engine's own answer

    def busy(message: GetState) -> EngineState:
        return msgspec.structs.replace(idle(message.call_id), num_waiting=3, num_running=2)

    engine.script.answers = {GetState: busy}
    async with api(engine) as server:
        text = (await server.http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in (*names, sizes):
        assert families[name].type == "gauge" and families[name].samples, name
        assert all(sample.timestamp is None for sample in families[name].samples)  # so the first one counts
    waiting, running, usage = (families[name].samples[0].value for name in names)
    assert (waiting, running) == (3, 2) and 0 <= usage <= 1
    by_label = [int(families[sizes].samples[0].labels[label]) for label in labels]
    assert all(size > 0 for size in by_label)
    for name, size in zip(SIZES.get(kind, ()), by_label, strict=kind in SIZES):
        assert families[name].type == "gauge" and families[name].samples[0].value == size
