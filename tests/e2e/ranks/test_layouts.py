"""Engines times ranks in real processes, up to eight ranks: requests that share a prefix, flushes of all modes, faults.

Whatever the layout, texts are those of one process, every engine makes every flush, and every page is free or cached.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from rank_servers import hanging_ranks, ranks_by_engine, status, wait_until
from running_server import RunningServer
from test_parking import restored_tokens
from tiered import DEVICE, HOST, PROMPT_TOKENS, SAMPLING, wait_idle

from processes import is_alive

pytestmark = [pytest.mark.slow, pytest.mark.load]

NUM_PROMPTS = 10
SHARED = 64  # tokens: 4 pages, which a flush takes from all of them
FLUSHES = ("mode=now", "mode=drain", "mode=idle&hold=true", "mode=now&tiers=device")


def prompt(number: int) -> list[int]:
    """Prompts of the length of tiered.py whose first tokens are the same."""
    own = [3 + (number * 17 + place * 31) % 200 for place in range(PROMPT_TOKENS - SHARED)]
    return [3 + (place * 29) % 200 for place in range(SHARED)] + own


@pytest.fixture(scope="module")
def wide_expected(wide_model: str) -> list[list[int]]:
    from headwater import Engine  # here: it imports torch

    with Engine(wide_model, dtype="float32", disable_radix_cache=True, log_level="warning") as plain:
        return [plain.generate(input_ids=prompt(n), sampling_params=SAMPLING)["output_ids"] for n in range(NUM_PROMPTS)]


@dataclass(frozen=True)
class Layout:
    server: RunningServer
    num_engines: int
    num_ranks: int
    hang_file: Path

    def ask(self, number: int, engine: int) -> dict:
        body = {"input_ids": prompt(number), "sampling_params": SAMPLING, "routed_dp_rank": engine}
        answer = self.server.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask_all(self) -> list[list[int]]:
        """Every prompt, from one engine after another."""
        with ThreadPoolExecutor(6) as pool:
            answers = pool.map(self.ask, range(NUM_PROMPTS), itertools.cycle(range(self.num_engines)))
            return [answer["output_ids"] for answer in answers]

    def flush(self, parameters: str) -> None:
        answer = self.server.post(f"/flush_cache?{parameters}&timeout=60", headers={"Accept": "application/json"})
        assert answer.status_code == 200, answer.text
        assert [engine["success"] for engine in answer.json()["engines"]] == [True] * self.num_engines


@pytest.fixture(scope="module", params=[(2, 2), (4, 1), (1, 4), (1, 8)], ids=lambda it: f"dp{it[0]}-tp{it[1]}")
def layout(
    request: pytest.FixtureRequest, wide_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Layout]:
    num_engines, num_ranks = request.param
    hang_file = tmp_path_factory.mktemp("hang") / "now"
    sizes = ("--dp-size", str(num_engines), "--tp-size", str(num_ranks), "--threads", "1", "--engine-restarts", "5")
    with hanging_ranks(hang_file):
        server = RunningServer(
            "--device", "cpu", "--model", wide_model, *DEVICE, *HOST, "--hicache-ratio", "2", *sizes,
            "--rank-timeout", "15",
        )  # fmt: skip
    with server as running:
        yield Layout(running.wait_healthy(), num_engines, num_ranks, hang_file)


def test_texts_and_pages_under_flushes_of_every_mode(layout: Layout, wide_expected: list[list[int]]) -> None:
    """A flush goes to all engines while all of them compute what shares a prefix."""
    stop = threading.Event()
    rounds: list[list[list[int]]] = []

    def load() -> None:
        while not stop.is_set():
            rounds.append(layout.ask_all())

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        for parameters in FLUSHES:
            before = len(rounds)
            layout.flush(parameters)
            wait_until(lambda before=before: len(rounds) > before or loading.done(), layout.server)
        stop.set()
        loading.result()
    assert all(texts == wide_expected for texts in rounds)
    assert len(rounds) >= len(FLUSHES)
    wait_idle(layout.server)
    tiers = layout.server.get("/cache").json()["tiers"]
    assert all(tier["free_pages"] + tier["evictable_pages"] == tier["capacity_pages"] for tier in tiers.values()), tiers


def test_a_flush_leaves_nothing_in_any_engine(layout: Layout, wide_expected: list[list[int]]) -> None:
    layout.ask_all()
    again = [layout.ask(0, engine) for engine in range(layout.num_engines)]
    assert all(answer["meta_info"]["cached_tokens"] >= SHARED for answer in again)
    layout.flush("mode=now")
    after = [layout.ask(0, engine) for engine in range(layout.num_engines)]
    assert [answer["meta_info"]["cached_tokens"] for answer in after] == [0] * layout.num_engines
    assert all(answer["output_ids"] == wide_expected[0] for answer in again + after)


def test_pages_that_come_back_from_the_host_are_those_of_all_ranks(
    layout: Layout, wide_expected: list[list[int]]
) -> None:
    """Host memory holds whole pages: a rank that restored another one's heads would change the text."""
    for _ in range(10):
        assert layout.ask_all() == wide_expected
        if restored_tokens(layout.server):
            break
        layout.flush("mode=now&tiers=device")  # with several engines, each has room for its prompts
    assert restored_tokens(layout.server) > 0


def _wait_served(layout: Layout) -> None:
    def is_served() -> bool:
        return all(status(layout.server, engine, 1) == 200 for engine in range(layout.num_engines))

    wait_until(is_served, layout.server)
    assert [len(it) for it in ranks_by_engine(layout.server).values()] == [layout.num_ranks - 1] * layout.num_engines


def test_a_killed_rank_takes_its_engine_along_and_all_come_back(layout: Layout, wide_expected: list[list[int]]) -> None:
    """The last rank; of an engine of one rank the engine itself."""
    (engine, ranks), *others = ranks_by_engine(layout.server).items()
    gone = [engine, *ranks]
    os.kill(gone[-1], signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in gone), layout.server)
    _wait_served(layout)
    after = ranks_by_engine(layout.server)
    assert all(after[engine] == its_ranks for engine, its_ranks in others), "other engines go on"
    assert layout.ask_all() == wide_expected


def test_ranks_that_hang_are_named_and_their_engine_comes_back(layout: Layout, wide_expected: list[list[int]]) -> None:
    if layout.num_ranks == 1:
        pytest.skip("a rank that hangs is another one than rank 0")
    layout.hang_file.touch()
    body = {"input_ids": prompt(0), "sampling_params": SAMPLING, "routed_dp_rank": 0}
    answer = layout.server.post("/generate", json=body)
    layout.hang_file.unlink()
    assert answer.status_code == 503, answer.text
    named = "rank 1" + "".join(f" and rank {rank}" for rank in range(2, layout.num_ranks))
    assert named in answer.text and "not finished a step for" in answer.text, answer.text
    _wait_served(layout)
    assert layout.ask_all() == wide_expected
