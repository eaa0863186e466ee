"""Servers on one redis, in real processes."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import RunningServer
from tiered import NUM_CACHED, NUM_PROMPTS, TIERS, ask, details, store_of, wait_stored

sys.path.append(str(Path(__file__).parents[1] / "storage"))
from redis_server import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.load]
MAIN = range(NUM_PROMPTS)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


def redis_server(model: str, redis: RedisServer) -> RunningServer:
    return RunningServer(
        "--model", model, *TIERS, "--hicache-storage-backend", "redis", "--hicache-storage-url", redis.url
    )


def test_redis_is_shared_and_its_death_costs_hits_alone(
    tiny_model: str, redis: RedisServer, expected: list[list[int]]
) -> None:
    """Two servers, one redis; then it is killed and started anew (empty) with requests under way."""
    with redis_server(tiny_model, redis).wait_healthy() as one:
        assert ask(one, 0)["output_ids"] == expected[0]
        wait_stored(one, NUM_CACHED // 16)
        with redis_server(tiny_model, redis).wait_healthy() as two:
            answer = ask(two, 0)
            assert (details(answer)["storage"], answer["output_ids"]) == (NUM_CACHED, expected[0])
            assert details(ask(two, 0, cache_salt="other"))["storage"] == 0
        results: dict[int, list[int]] = {}

        def work(numbers: range) -> None:
            for number in numbers:
                results[number] = ask(one, number)["output_ids"]

        threads = [threading.Thread(target=work, args=(MAIN[start::2],)) for start in (0, 1)]
        for thread in threads:
            thread.start()
        redis.kill()
        redis.start()
        for thread in threads:
            thread.join(180)
        assert [results[number] for number in MAIN] == expected
        assert one.health() == 200 and store_of(one)["kind"] == "redis"
