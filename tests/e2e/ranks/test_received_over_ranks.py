"""Weights that a trainer sends to an engine of several ranks: all ranks have them, or none; a rank dies in between.

Each rank holds some rows or columns of a matrix: a rank that kept the old ones would change the text and the hashes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from running_server import RunningServer
from safetensors.numpy import load_file, save
from tiered import DEVICE, ask

from headwater.bench.machine import children_of
from processes import held_port, number_of

pytestmark = pytest.mark.slow
TRAINER = Path(__file__).parents[2] / "http_api" / "control" / "weights" / "trainer.py"
Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[RunningServer]:
    options = ("--device", "cpu", "--tp-size", "2", "--threads", "1", "--engine-restarts", "5")
    with RunningServer("--model", tiny_model, *DEVICE, *options) as running:
        yield running.wait_healthy()


def tensors_of(folder: str) -> Tensors:
    (path,) = Path(folder).glob("*.safetensors")
    return load_file(path)


def send(server: RunningServer, tensors: Tensors, status: int = 200) -> httpx.Response:
    headers = {"content-type": "application/vnd.safetensors"}
    answer = server.post("/update_weights_from_tensor", content=save(tensors), headers=headers)
    assert answer.status_code == status, answer.text
    return answer


def hashes(server: RunningServer) -> dict[str, str]:
    answer = server.get("/weights_checker")
    assert answer.status_code == 200, answer.text
    return answer.json()["ranks"][0]["checksums"]


def texts(server: RunningServer) -> list[list[int]]:
    return [ask(server, number)["output_ids"] for number in range(3)]


def order(trainer: subprocess.Popen[str], **said: object) -> str:
    assert trainer.stdin is not None and trainer.stdout is not None
    trainer.stdin.write(json.dumps(said) + "\n")
    return trainer.stdout.readline().strip()


def test_hashes_are_of_the_shares_of_all_ranks(server: RunningServer, tiny_model: str) -> None:
    """Either half of the rows, and either half of the columns, is another rank's."""
    before, tensors = hashes(server), tensors_of(tiny_model)
    assert hashes(server) == before
    down = "model.layers.0.mlp.down_proj.weight"
    for name, place in ((Q_PROJ, (0, 0)), (Q_PROJ, (-1, 0)), (down, (0, 0)), (down, (0, -1))):
        changed = tensors[name].copy()
        changed[place] += 1.0
        send(server, {name: changed})
        after = hashes(server)
        assert {key for key in before if before[key] != after[key]} == {name}, place
        send(server, {name: tensors[name]})
        assert hashes(server) == before


def test_tensors_and_brackets_reach_all_ranks_or_none(
    server: RunningServer,
    tiny_model: str,
    other_model: str,
    expected: list[list[int]],
    other_expected: list[list[int]],
) -> None:
    others, first = tensors_of(other_model), hashes(server)
    send(server, others)
    assert texts(server) == other_expected[:3]
    second = hashes(server)
    assert all(first[name] != second[name] for name in (Q_PROJ, "model.embed_tokens.weight"))

    own = tensors_of(tiny_model)
    names = list(own)
    assert server.post("/begin_weight_update", json={}).status_code == 200
    for part in (names[::2], names[1::2]):
        send(server, {name: own[name] for name in part})
        assert (texts(server), hashes(server)) == (other_expected[:3], second)
    assert server.post("/end_weight_update", json={"weight_version": "own"}).status_code == 200
    assert (texts(server), hashes(server)) == (expected[:3], first)

    assert server.post("/begin_weight_update", json={}).status_code == 200
    send(server, {name: others[name] for name in names[::2]})
    send(server, {Q_PROJ: np.zeros((3, 3), dtype=np.float32)}, status=400)
    assert server.post("/end_weight_update", json={}).status_code == 400
    assert (texts(server), hashes(server)) == (expected[:3], first)


def test_a_rank_that_dies_in_a_bracket_comes_back_with_the_weights_that_were_sent(
    server: RunningServer, other_model: str, tiny_model: str, other_expected: list[list[int]], expected: list[list[int]]
) -> None:
    """The bracket is the API process's. What it put in place before outlives the rank and the engine."""
    others, own = tensors_of(other_model), tensors_of(tiny_model)
    send(server, others)
    sent = hashes(server)
    names = list(own)
    assert server.post("/begin_weight_update", json={}).status_code == 200
    send(server, {name: own[name] for name in names[::2]})
    (rank,) = children_of(server.engine_pid())
    os.kill(rank, signal.SIGKILL)
    deadline_s = time.monotonic() + 90
    one = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
    while server.post("/generate", json=one).status_code != 200:
        assert time.monotonic() < deadline_s, server.log
        time.sleep(0.1)
    assert "was killed by SIGKILL" in server.log
    assert (texts(server), hashes(server)) == (other_expected[:3], sent)
    send(server, {name: own[name] for name in names[1::2]})
    assert server.post("/end_weight_update", json={}).status_code == 200
    assert texts(server) == expected[:3]


def test_a_group_over_gloo_has_a_member_for_each_rank(server: RunningServer) -> None:
    holder = held_port()
    port = number_of(holder)
    group = {
        "master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 3, "group_name": "g",
        "backend": "gloo",
    }  # fmt: skip
    bucket = {"names": [NORM, Q_PROJ], "dtypes": ["float32"] * 2, "shapes": [[64], [64, 64]], "group_name": "g"}
    before = hashes(server)
    command, pipe = [sys.executable, str(TRAINER)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as trainer:
        try:
            with ThreadPoolExecutor(1) as pool:
                made = pool.submit(order, trainer, join={"port": port, "world_size": 3, "name": "g"})
                assert server.post("/init_weights_update_group", json=group).status_code == 200
                assert made.result() == "ok"
                sent = pool.submit(order, trainer, send=[([64], "float32", 2.0), ([64, 64], "float32", 3.0)])
                answer = server.post("/update_weights_from_distributed", json=bucket)
                assert answer.status_code == 200, answer.text
                assert sent.result() == "ok"
        finally:
            trainer.kill()
            holder.close()
    after = hashes(server)
    assert {name for name in before if before[name] != after[name]} == {NORM, Q_PROJ}
    shown = server.get(f"/get_weights_by_name?name={Q_PROJ}&truncate_size=4096").json()["engines"]
    assert [set(engine["values"]) for engine in shown] == [{3.0}], "both ranks' rows"
    assert server.post("/destroy_weights_update_group", json={"group_name": "g"}).status_code == 200
