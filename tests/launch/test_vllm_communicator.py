"""How the server's ranks meet a trainer that speaks vLLM's communicator. NCCL itself needs cards: here it is a fake."""

import ctypes
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.launch.receiving.device_copies import FileWriter
from headwater.launch.receiving.nccl_library import NcclCommunicator, NcclLibrary
from headwater.launch.receiving.tensors import Group
from headwater.launch.receiving.vllm_communicator import join_vllm, unique_id
from headwater.messages.receiving import VLLM, JoinGroup, ReceiveBucket
from processes import held_port, number_of

STAND_INS = Path(__file__).parents[2] / "integrations" / "training" / "stand_ins"
pytestmark = pytest.mark.slow
ID = bytes(range(128, 256))
WORDS = ctypes.create_string_buffer(b"unhandled cuda error")
SIZES = {1: 1, 7: 4, 9: 2}  # of nccl.h's types
STREAM = (7 << 40) + 16  # more than 32 bits


class Id(ctypes.Structure):
    """As nccl.h has it."""

    _fields_ = (("internal", ctypes.c_char * 128),)


class FakeLibrary:
    """NCCL's C functions: arguments come through C, the id by value. A broadcast fills memory with ones."""

    def __init__(self) -> None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        buffers = (pointer, pointer, size, number, number, pointer, pointer)
        self.ncclGetUniqueId = ctypes.CFUNCTYPE(number, ctypes.POINTER(Id))(self._unique_id)
        init = ctypes.CFUNCTYPE(number, ctypes.POINTER(pointer), number, Id, number)
        self.ncclCommInitRank = init(self._init_rank)
        self.ncclAllReduce = ctypes.CFUNCTYPE(number, *buffers)(self._all_reduce)
        self.ncclBroadcast = ctypes.CFUNCTYPE(number, *buffers)(self._broadcast)
        self.ncclGetErrorString = ctypes.CFUNCTYPE(pointer, number)(lambda _: ctypes.addressof(WORDS))
        self.ranks: dict[int, tuple[int, bytes]] = {}
        self.summed: list[tuple[int, ...]] = []
        self.sent: list[tuple[int, ...]] = []
        self.fails = 0

    def _unique_id(self, to: Any) -> int:
        ctypes.memmove(to, ID, 128)
        return 0

    def _init_rank(self, to: Any, size: int, unique: Id, rank: int) -> int:
        self.ranks[rank] = size, bytes(unique)
        to[0] = 1000 + rank
        return self.fails

    def _all_reduce(self, _: int, __: int, *facts: int) -> int:
        self.summed.append(facts)
        return 0

    def _broadcast(self, _at: int, to: int, *facts: int) -> int:
        count, kind = facts[:2]
        ctypes.memmove(to, b"\1" * (count * SIZES[kind]), count * SIZES[kind])
        self.sent.append(facts)
        return self.fails


class NoStream:
    cuda_stream = STREAM

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


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A machine with a card, as far as the communicator looks."""
    library, zeros = FakeLibrary(), torch.zeros
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: NoStream())
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **more: zeros(*shape, **more))
    return library


def test_both_sides_meet_by_the_trainers_id(stand_in: Any, fake: FakeLibrary, tmp_path: Path) -> None:
    with held_port() as holder, ThreadPoolExecutor(1) as threads:
        info = {"master_address": "127.0.0.1", "master_port": number_of(holder), "world_size": 2}
        call = JoinGroup(**info, rank=1, group_name="vllm", backend=VLLM, device=0, timeout_s=60)
        trainer = threads.submit(stand_in.trainer_init, info)
        member = join_vllm(call)
        trainer.result(60).broadcast(torch.zeros(5, dtype=torch.bfloat16), 0)
    assert fake.ranks == {0: (2, ID), 1: (2, ID)}
    # one number of float32, added up by both: the trainer waits in that sum
    assert sorted(fake.summed) == [(1, 7, 0, 1000, STREAM), (1, 7, 0, 1001, STREAM)]
    assert fake.sent == [(5, 9, 0, 1000, STREAM)]
    # what is received so lies in a bucket's file
    path = tmp_path / "bucket"
    path.touch()
    bucket = ReceiveBucket(names=("w",), dtypes=("F32",), shapes=((3,),), is_flattened=True, path=str(path))
    Group(member.broadcast, torch.device("cpu"), FileWriter(1)).receive(bucket)
    assert path.read_bytes().endswith(b"\1" * 12) and fake.sent[1] == (12, 1, 0, 1001, STREAM)


def test_what_nccl_refuses_is_an_error_in_its_words(fake: FakeLibrary) -> None:
    library = NcclLibrary()
    communicator = NcclCommunicator(library, size=2, unique_id=ID, rank=1)
    fake.fails = 1
    with pytest.raises(RuntimeError, match=r"ncclBroadcast: unhandled cuda error \(NCCL's error 1\)"):
        communicator.broadcast(torch.zeros(1))
    with pytest.raises(RuntimeError, match="ncclCommInitRank"):
        NcclCommunicator(library, size=2, unique_id=ID, rank=1)


def test_a_machine_without_the_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match="library was not found: libnccl"):
        NcclLibrary()


def test_a_trainer_that_never_comes_is_a_timeout() -> None:
    with held_port() as holder:
        call = JoinGroup("127.0.0.1", number_of(holder), 1, 2, "vllm", VLLM, 0, timeout_s=1)
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
