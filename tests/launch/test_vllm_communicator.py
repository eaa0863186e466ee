"""How the server's ranks meet a trainer that speaks vLLM's communicator. NCCL itself needs cards: here it is a fake."""

import pickle
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.launch.receiving import vllm_communicator
from headwater.launch.receiving.device_copies import FileWriter
from headwater.launch.receiving.tensors import Group
from headwater.launch.receiving.vllm_communicator import join_vllm, unique_id
from headwater.messages.receiving import VLLM, JoinGroup, ReceiveBucket

STAND_INS = Path(__file__).parents[2] / "integrations" / "training" / "stand_ins"
pytestmark = pytest.mark.slow
ID = bytes(range(128, 256))


class FakeNccl:
    """Who became which rank by which id; a broadcast fills a tensor with ones."""

    def __init__(self) -> None:
        self.ranks: dict[int, tuple[int, bytes]] = {}
        self.num_summed = 0

    def unique_id(self) -> bytes:
        return ID

    def init_rank(self, size: int, unique: bytes, rank: int) -> int:
        self.ranks[rank] = size, unique
        return rank

    def all_reduce(self, inputs: Sequence[torch.Tensor], *, comms: Sequence[int]) -> None:
        self.num_summed += 1

    def broadcast(self, inputs: Sequence[torch.Tensor], *, comms: Sequence[int]) -> None:
        inputs[0].fill_(1)


class NoStream:
    def synchronize(self) -> None: ...


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The trainer's side, as trl imports it."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    from vllm.distributed.weight_transfer import nccl_common

    yield nccl_common
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def test_both_sides_meet_by_the_trainers_id(stand_in: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, zeros = FakeNccl(), torch.zeros
    monkeypatch.setattr(vllm_communicator, "nccl", fake)
    monkeypatch.setattr(stand_in, "nccl", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: NoStream())
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **more: zeros(*shape, **more))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    info = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
    call = JoinGroup(**info, rank=1, group_name="vllm", backend=VLLM, device=0, timeout_s=60)
    with ThreadPoolExecutor(1) as threads:
        trainer = threads.submit(stand_in.trainer_init, info)
        member = join_vllm(call)
        trainer.result(60)
    assert fake.ranks == {0: (2, ID), 1: (2, ID)}
    assert fake.num_summed == 2, "the trainer waits in the sum of one number"
    # what is received so lies in a bucket's file
    (tmp_path / "bucket").touch()
    bucket = ReceiveBucket(
        names=("w",), dtypes=("F32",), shapes=((3,),), is_flattened=False, path=str(tmp_path / "bucket")
    )
    Group(member.broadcast, torch.device("cpu"), FileWriter(1)).receive(bucket)
    assert (tmp_path / "bucket").read_bytes().endswith(torch.ones(3).numpy().tobytes())


def test_a_trainer_that_never_comes_is_a_timeout() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call = JoinGroup("127.0.0.1", port, 1, 2, "vllm", VLLM, 0, timeout_s=1)
    with pytest.raises(RuntimeError):  # of PyTorch, which the trainer gets in words
        join_vllm(call)


def test_the_id_is_read_and_nothing_of_the_pickle_is_executed(stand_in: Any) -> None:
    structure = stand_in.ncclUniqueId.from_buffer_copy(ID)
    for protocol in (3, 4, 5):
        assert unique_id(pickle.dumps(structure, protocol)) == ID

    class Attack:
        def __reduce__(self) -> Any:
            return pytest.fail, ("it was executed",)

    for payload in (
        b"",
        b"\x80\x04no pickle",
        pickle.dumps(Attack()),
        pickle.dumps(ID),
        pickle.dumps(("ncclUniqueId", b"short")),
    ):
        with pytest.raises(ValueError, match="id of NCCL"):
            unique_id(payload)
