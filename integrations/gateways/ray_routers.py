"""Checks of Ray's autoscaling and of its routers, for ray_serve_llm.py: by prefixes, and by events of the cache."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from ray.llm._internal.serve.routing_policies.kv_aware.kv_aware_router import KVAwareRouter
from ray.llm._internal.serve.routing_policies.kv_aware.kv_token_tracker import KVTokenTracker, get_worker_id
from ray.llm._internal.serve.utils.broadcast import broadcast
from ray.serve._private.common import DeploymentID
from ray.serve.llm import LLMConfig, ModelLoadingConfig, build_openai_app
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

from checks import Server, call, check

APPLICATION = "default"
MODEL, GROWING, WATCHED = "smollm2-135m-instruct", "growing", "watched"
PAGE = 16
NUM_GROUPS, NUM_ROUNDS = 8, 4
NUM_CLIENTS = 4  # twice as many as one replica is to have
LIMIT_S = 400.0  # on a busy machine, a replica imports for two minutes


def config(name: str, **deployment: Any) -> LLMConfig:
    """The default model under this name."""
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=name, model_source=MODEL),
        server_cls="headwater.ray.llm_server:HeadwaterServer",
        engine_kwargs={"device": "cpu", "threads": 1, "max_total_tokens": 8192},
        deployment_config={"ray_actor_options": {"num_cpus": 1}} | deployment,
        accelerator_type=None,
    )


def growing_config() -> LLMConfig:
    limits = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1}
    router = {"request_router_class": PrefixCacheAffinityRouter}
    return config(GROWING, autoscaling_config=limits, request_router_config=router)


def completed(server: Server, prompt: str, *, num_tokens: int = 1) -> Any:
    """The usage of a completion."""
    body = {"model": server.model, "prompt": prompt, "temperature": 0, "max_tokens": num_tokens}
    return call(server.url, "/v1/completions", body)["usage"]


def num_cached(server: Server, prompt: str) -> int:
    return (completed(server, prompt)["prompt_tokens_details"] or {}).get("cached_tokens", 0)


def until(holds: Callable[[], Any]) -> Any:
    deadline_s = time.monotonic() + LIMIT_S
    while not (found := holds()):
        assert time.monotonic() < deadline_s, "it has not come"
        time.sleep(0.2)
    return found


def num_running(model: str, *, application: str = APPLICATION) -> int:
    deployment = serve.status().applications[application].deployments[f"HeadwaterServer:{model}"]
    return deployment.replica_states.get("RUNNING", 0)


def of_replicas(model: str, path: str, *, application: str = APPLICATION, body: Any = None) -> list[Any]:
    """What a route of each replica's own server answers. `body` of None: GET; a function gives each replica its own."""
    handle = serve.get_deployment_handle(f"HeadwaterServer:{model}", application)
    args = (lambda replica: (path, body(replica))) if callable(body) else (path, body)
    return broadcast(handle, "_control", args, {"method": "GET" if body is None else "POST"})


def pages_cached(model: str) -> list[int]:
    """By each replica: what a flush would free."""
    answers = of_replicas(model, "/flush_cache?mode=now&dry_run=true", body={})
    return [answer["freed"]["device"]["pages"] for answer in answers]


def declare_checks() -> None:
    check("scales", limit_s=LIMIT_S + 20)(scales)
    check("prefixes")(prefixes)
    check("events", limit_s=LIMIT_S)(events)


def scales(server: Server) -> None:
    """From one replica to two, under load, without a request lost."""
    server = Server(server.url, GROWING)
    assert num_running(GROWING) == 1
    is_over = False

    def load(number: int) -> int:
        num_whole = 0
        while not is_over:
            num_whole += completed(server, f"{number} is a number.", num_tokens=32)["completion_tokens"] == 32
        return num_whole

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        loads = [pool.submit(load, number) for number in range(NUM_CLIENTS)]
        try:
            until(lambda: num_running(GROWING) == 2 or any(each.done() for each in loads))
        finally:
            is_over = True
    assert all(each.result() > 0 for each in loads)
    assert num_running(GROWING) == 2


def prefixes(server: Server) -> None:
    """Nine tenths at least of the hits that one replica would have, and both replicas serve."""
    server = Server(server.url, GROWING)
    assert num_running(GROWING) == 2
    call(server.url, "/reset_prefix_cache", {"model": GROWING})
    texts = [f"{group} times a reader asks for chapter {group}. " * 10 for group in range(11, 11 + NUM_GROUPS)]
    hits = possible = 0
    for turn in range(NUM_ROUNDS):
        for text in texts:
            usage = completed(server, f"{text}{turn}")
            if turn > 0:
                possible += usage["prompt_tokens"] - PAGE
                hits += (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
    assert hits >= 0.9 * possible, (hits, possible)
    assert all(pages > 0 for pages in pages_cached(GROWING))


def events(server: Server) -> None:
    """Ray's index of cache events knows which replica holds a prompt, and that a flush has taken it away.

    The index is the one that Ray's LLMRouter asks, made here: LLMRouter itself does not start without vLLM.
    """
    serve.delete(APPLICATION)  # its memory
    router = {"request_router_class": KVAwareRouter, "request_routing_stats_period_s": 1.0}
    watched = config(WATCHED, num_replicas=2, request_router_config=router)
    serve.run(build_openai_app({"llm_configs": [watched]}), name=WATCHED)
    asyncio.run(_events(Server(server.url, WATCHED)))


async def _events(server: Server) -> None:
    tracker = KVTokenTracker(serve_deployment_id=DeploymentID(f"HeadwaterServer:{WATCHED}", WATCHED))
    workers = tracker._replica_id_by_worker
    await _until(lambda: len(workers) == 2)
    assert tracker.get_block_size() == PAGE
    texts = {worker: f"Replica {number} is asked for a long story. " * 8 for number, worker in enumerate(workers)}

    def body(replica: Any) -> Any:
        return {"prompt": texts[get_worker_id(replica.unique_id)], "max_tokens": 1, "temperature": 0}

    await asyncio.to_thread(of_replicas, WATCHED, "/v1/completions", application=WATCHED, body=body)
    for worker, text in texts.items():
        tokens = call(server.url, "/tokenize", {"model": WATCHED, "prompt": text})["tokens"]

        async def selected(tokens: list[int] = tokens) -> Any:
            id = str(time.monotonic_ns())
            selection = await tracker.select_worker(id, tokens, list(workers))
            await tracker.on_request_completed(id)
            return selection

        async def has(num_tokens: int, selected: Callable[[], Any] = selected) -> bool:
            return (await selected())["overlap_tokens"] == num_tokens

        await _until(lambda has=has, num_pages=len(tokens) // PAGE: has(num_pages * PAGE))
        assert (await selected())["worker_id"] == worker
        await asyncio.to_thread(of_replicas, WATCHED, "/flush_cache?mode=now", application=WATCHED, body={})
        await _until(lambda has=has: has(0))
        await asyncio.to_thread(of_replicas, WATCHED, "/v1/completions", application=WATCHED, body=body)
    assert completed(server, "Ray's own ingress answers, and chooses at random.")["completion_tokens"] == 1


async def _until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while True:
            found = holds()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.1)
