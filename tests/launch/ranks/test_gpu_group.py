"""How many pages ranks on GPUs agree on, and how a failure ends their engine."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")

from headwater.devices.cpu.ranks.page_share import PageShare
from headwater.devices.kv_memory import KVLayout
from headwater.launch.child_process import EXIT_CRASHED
from headwater.launch.config import ServerArgs
from headwater.launch.ranks.gpu_group import EngineMeetings, RankMeetings, end_hard
from headwater.launch.ranks.start import num_pages_of
from tiny_models import make_tiny_model

pytestmark = pytest.mark.slow  # torch
LIMIT_S = 60.0


def test_an_engine_ends_also_if_a_rank_has_ended_before_it(tmp_path: Path) -> None:
    """A process that has been waited for cannot be killed; the others still are."""
    gone, alive = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    gone.kill()
    gone.wait()
    engine = os.fork()
    if engine == 0:
        try:
            end_hard([gone.pid, alive.pid], (tmp_path / "cleaned").touch)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1]) == EXIT_CRASHED
    assert alive.wait(LIMIT_S) == -signal.SIGKILL
    assert (tmp_path / "cleaned").exists()


class _Memory:
    """As much of a placement, a device and a loaded model as the number of pages depends on."""

    def __init__(self, name: str, *, free_bytes: int) -> None:
        self.name, self.device = name, self
        self._free_bytes = free_bytes
        self.weights_bytes, self.share, self.size, self.config = 1000, self, 2, None

    def free_memory_bytes(self) -> int:
        return self._free_bytes

    def workspace_bytes(self, args: ServerArgs, config: object) -> int:
        return 200


def test_a_rank_on_a_gpu_counts_its_part_of_pages_in_its_own_memory() -> None:
    """A CPU's ranks fill one memory with whole pages; sizes that the user names are those of whole pages everywhere."""
    whole, own = (
        KVLayout(num_layers=1, num_kv_heads=heads, head_dim=8, page_size=1, dtype="float32") for heads in (4, 2)
    )
    share = PageShare(whole, own, first_head=0)
    assert (whole.page_bytes, own.page_bytes) == (256, 128)

    def found(name: str, **args: object) -> int:
        memory = _Memory(name, free_bytes=9000)
        return num_pages_of(ServerArgs(page_size=1, **args), memory, memory, share=share, max_context=64)  # type: ignore[arg-type]

    assert found("cuda", mem_fraction_static=0.5) == (5000 - 1000 - 200) // 128
    assert found("cpu", mem_fraction_static=0.5) == (5500 - 2000 - 200) // 256
    assert found("cuda", max_total_tokens=70) == found("cpu", max_total_tokens=70) == 70
    assert found("cuda", kv_cache_memory_mb=1) == found("cpu", kv_cache_memory_mb=1) == (1 << 20) // 256


def test_a_lost_rank_ends_the_engine_but_not_one_that_loads_or_has_ended() -> None:
    ended = threading.Event()
    meetings = EngineMeetings(end=lambda rank: ended.set(), grace_s=0.01)
    meetings.may_hang = False
    meetings.abort(1)
    assert not ended.wait(0.1), "rank 0 loads: it hears of the loss when it asks the others"
    meetings.may_hang = True
    meetings.abort(1)
    assert ended.wait(LIMIT_S)
    ended.clear()
    meetings.abort(0)
    assert not ended.wait(0.1), "once"
    assert not meetings.close()
    closed = EngineMeetings(end=lambda rank: ended.set(), grace_s=0.01)
    assert closed.close()
    closed.abort(1)
    assert not ended.wait(0.1), "an end in order is not cut short"
    for each in (closed, RankMeetings(1)):
        with pytest.raises(RuntimeError, match="do not leave a failed step"):
            each.reset()


@pytest.mark.skipif("HEADWATER_TEST_INTERPRETED_RANKS" not in os.environ, reason="a minute of interpreted kernels")
def test_an_engine_of_two_ranks_answers_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not meet, other heads or pages on one of them, and heads that come back from the host wrong."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "e2e"))
    from interpreted_cards import ARGS, SAMPLING
    from tiered import write_byte_tokenizer  # type: ignore[import-not-found]

    from headwater import Engine

    make_tiny_model("llama", tmp_path)
    write_byte_tokenizer(tmp_path)
    prompts = [[3 + (number * 17 + place * 31) % 200 for place in range(80)] for number in (0, 1, 0)]
    with Engine(str(tmp_path), device="cpu", **ARGS) as engine:
        answers = [engine.generate(input_ids=ids, sampling_params=SAMPLING) for ids in prompts]
    assert answers[2]["meta_info"]["cached_tokens_details"]["host"] > 0
    command = [
        sys.executable,
        str(Path(__file__).with_name("interpreted_cards.py")),
        str(tmp_path),
        json.dumps(prompts),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=280, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [it["output_ids"] for it in answers]
