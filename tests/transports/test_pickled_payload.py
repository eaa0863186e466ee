"""Pickles of trainers: real ones are read to the byte, and hostile ones never do anything."""

import contextlib
import io
import os
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from handmade_pickles import REDUCTIONS, Named, dumps, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.devices.safetensors_header import parse_header
from headwater.transports.pickled.host_tensors import write_bucket
from headwater.transports.pickled.machine import Machine, PickleRefused
from headwater.transports.pickled.payload import (
    TABLE,
    CudaTensorHandle,
    HostTensorView,
    load_payload,
    named_tensors,
)


def bucket_of(payload: bytes, *, is_flattened: bool = False, folder: Path = Path("/dev/shm")) -> dict[str, Any]:
    """dtype, shape and bytes of each tensor of the bucket that a payload becomes."""
    out = bytearray()
    tensors = named_tensors(payload, is_flattened=is_flattened)
    write_bucket(tensors, out.extend, shared_memory=folder)
    length = int.from_bytes(out[:8], "little")
    found = parse_header(bytes(out[8 : 8 + length]), size=len(out))
    return {
        name: (stored.dtype, stored.shape, bytes(out[stored.start : stored.start + stored.num_bytes]))
        for name, stored in found.items()
    }


# --- payloads that were made by hand, as PyTorch makes them: no torch here ---


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    (tmp_path / "torch_1_2_0").write_bytes(bytes(64) + bytes(range(24)))
    return tmp_path


def test_tensors_in_shared_memory(memory: Path) -> None:
    tensors = [
        ("plain", shared(b"/torch_1_2_0", 24, "float32", (2, 3), (3, 1))),
        ("turned", shared(b"/torch_1_2_0", 24, "bfloat16", (3, 2), (1, 3), 1)),
        ("number", shared(b"/torch_1_2_0", 24, "float32", (), (), 2)),
        ("empty", shared(b"/torch_1_2_0", 24, "float32", (0, 5), (5, 1))),
    ]
    found = bucket_of(dumps(tensors), folder=memory)
    assert found["plain"] == ("F32", (2, 3), bytes(range(24)))
    assert found["turned"] == ("BF16", (3, 2), bytes([2, 3, 8, 9, 4, 5, 10, 11, 6, 7, 12, 13]))
    assert found["number"] == ("F32", (), bytes(range(8, 12)))
    assert found["empty"] == ("F32", (0, 5), b"")


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (shared(b"/torch_1_2_0", 24, "float32", (7,), (1,)), "larger than its storage"),
        (shared(b"/torch_1_2_0", 24, "float32", (2, 3), (4, 1)), "larger than its storage"),
        (shared(b"/torch_1_2_0", 24, "float32", (2,), (-1,)), "no plain number"),
        (shared(b"/torch_1_2_0", 24, "float32", (1 << 50,), (0,)), "no plain number"),
        (shared(b"/torch_1_2_0", 24, "float32", (1 << 47,), (0,)), "bytes together"),
        (shared(b"/torch_1_2_0", 25, "float32", (2,), (1,)), "smaller than its tensors"),
        (shared(b"/torch_1_2_9", 24, "float32", (2,), (1,)), "cannot be opened"),
        (shared(b"/../etc/passwd", 24, "float32", (2,), (1,)), "no shared memory of PyTorch"),
        (shared(b"/torch_1_2_0", 24, "Size", (2,), (1,)), "a dtype is expected"),
    ],
)
def test_what_does_not_fit_its_memory_is_refused(memory: Path, tensor: Any, reason: str) -> None:
    with pytest.raises(PickleRefused, match=reason):
        bucket_of(dumps([("a", tensor)]), folder=memory)


def test_handles_of_cuda_are_facts() -> None:
    facts = (1, b"h" * 64, 4096, 512, False, b"r", 3, b"e" * 64, True)
    tensor = Named(
        REDUCTIONS, "rebuild_cuda_tensor", Named("torch", "Tensor"), Named("torch", "Size", (4, 2)), (2, 1), 0,
        Named("torch.storage", "UntypedStorage"), Named("torch", "bfloat16"), *facts,
    )  # fmt: skip
    ((name, found),) = named_tensors(dumps([("a", tensor)]), is_flattened=False)
    assert name == "a" and isinstance(found, CudaTensorHandle)
    assert (found.dtype, found.shape) == ("BF16", (4, 2))
    assert found.arguments == ((4, 2), (2, 1), 0, "bfloat16", *facts)


# --- what an attacker sends -------------------------------------------------------------------------------------------


def global_of(module: str, name: str, arguments: bytes = b")") -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"),
        ("subprocess", "Popen"), ("torch", "load"), ("torch.hub", "load"), ("functools", "partial"),
        ("torch.storage", "os.system"), ("sglang.srt.utils.common", "dynamic_import"), ("__main__", "x"),
        ("multiprocessing.reduction", "_rebuild_socket"), ("copyreg", "__newobj_ex__"), ("types", "FunctionType"),
    ],
)  # fmt: skip
def test_other_names_are_refused_before_anything_is_built(module: str, name: str) -> None:
    with pytest.raises(PickleRefused, match="is not allowed"):
        load_payload(global_of(module, name))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "cut off"),
        (b"\x80\x02", "cut off"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\x80\x01N.", "protocol 1"),
        (b"\x80\x04B\xff\xff\xff\x7f.", "cut off: 2147483647 bytes"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "cut off"),
        (b"\x80\x04" + b"(" * 100 + b"t" * 100 + b".", "nested deeper"),
        (b"\x80\x04h\x05.", "nothing is remembered"),
        (b"\x80\x04Nr\xff\xff\xff\xff.", None),  # a memo slot far away costs one entry
        (b"\x80\x04NN.", "one value"),
        (b"\x80\x04]\x94h\x00a.", None),  # a list that holds itself
        (b"\x80\x04]N]a.", "only lists are"),
        (b"\x80\x04}]Ns.", "a key must be"),
        (b"\x80\x04ctorch\nTensor\n)\x81.", "of this kind is not allowed"),
        (b"\x80\x04ctorch\nTensor\n}b.", "state of this object"),
        (b"\x80\x04ctorch\nSize\n}b.", "state of this object"),
        (b"\x80\x04ctorch\nfloat32\n)R.", "no constructor"),
        (b"\x80\x04N)R.", "no constructor"),
        (b"\x80\x04X\x03\x00\x00\x00posX\x06\x00\x00\x00system\x93.", "pos.system is not allowed"),
        (b"\x80\x04Ni.", "opcode 0x69"),  # INST
        (b"\x80\x04(o.", "opcode 0x6f"),  # OBJ
        (b"\x80\x04\x82\x01.", "opcode 0x82"),  # EXT1
        (b"\x80\x04\x92.", "opcode 0x92"),  # NEWOBJ_EX
        (b"\x80\x04P1\n.", "opcode 0x50"),  # PERSID
        (b"\x80\x04NQ.", "persistent"),
        (b"\x80\x04c" + b"a" * 5000, "too long"),
        (b"\x80\x04X\x01\x00\x00\x00\xff.", "damaged"),
    ],
)
def test_tricks_with_opcodes(payload: bytes, reason: str | None) -> None:
    if reason is None:
        load_payload(payload)
    else:
        with pytest.raises(PickleRefused, match=reason):
            load_payload(payload)


def test_the_number_of_opcodes_is_bounded() -> None:
    with pytest.raises(PickleRefused, match="more than 2000000 opcodes"):
        load_payload(b"\x80\x04N" + b"N0" * 1_100_000 + b".")


OPCODES = st.sampled_from([bytes([code]) for code in range(256)])
PIECES = st.one_of(
    OPCODES,
    st.binary(max_size=6),
    st.sampled_from([f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode() for name in TABLE]),
    st.sampled_from([b"cos\nsystem\n", b"cbuiltins\neval\n", b"(", b"t", b")", b"R", b"b", b"\x81", b"\x94", b"h\x00"]),
    st.sampled_from([b"K\x01", b"\x8c\x01a", b"C\x02ab", b"]", b"}", b"a", b"s", b"N", b"J\xff\xff\xff\xff"]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=40), st.booleans())
def test_random_opcodes_end_in_a_refusal_or_in_data(pieces: list[bytes], is_flattened: bool) -> None:
    payload = b"\x80\x04" + b"".join(pieces) + b"."
    try:
        for name, tensor in named_tensors(payload, is_flattened=is_flattened):
            assert isinstance(name, str) and isinstance(tensor, HostTensorView | CudaTensorHandle)
    except PickleRefused:
        pass


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_payload_ends_in_a_refusal_or_in_tensors(data: st.DataObject) -> None:
    payload = bytearray(dumps([("a", shared(b"/torch_1_2_0", 24, "float32", (2, 3), (3, 1)))] * 2))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PickleRefused):
        named_tensors(bytes(payload), is_flattened=data.draw(st.booleans()))


def test_nothing_is_imported_or_called(tmp_path: Path) -> None:
    """In a process of its own: every call of a gadget would leave a mark, and every import would show."""
    mark = tmp_path / "mark"
    payloads = [
        b"cos\nsystem\n(X" + len(f"touch {mark}").to_bytes(4, "little") + f"touch {mark}".encode() + b"tR.",
        pickle.dumps(_Gadget(str(mark))),
    ]
    code = (
        "import sys\nfrom headwater.transports.pickled.payload import load_payload, PickleRefused\n"
        "before = set(sys.modules)\n"
        f"for payload in {payloads!r}:\n"
        "    try: load_payload(payload)\n    except PickleRefused as error: print(error)\n"
        "assert 'torch' not in sys.modules and 'pickle' not in set(sys.modules) - before, set(sys.modules) - before\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("not allowed") == 2
    assert not mark.exists()


class _Gadget:
    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self._path,))


# --- what PyTorch itself writes ---------------------------------------------------------------------------------------


def serialized(value: Any) -> bytes:
    out = io.BytesIO()
    ForkingPickler(out).dump(value)
    return out.getvalue()


@pytest.mark.slow
def test_pytorchs_own_payloads_are_read_to_the_byte() -> None:
    import torch

    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        "c": torch.nn.Parameter(torch.full((5,), 0.5, dtype=torch.float16)),
        "d": torch.arange(10, dtype=torch.float32)[3:7],
    }
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    expected = {name: bytes(tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in plain.items()}
    before = torch.multiprocessing.get_sharing_strategy()
    try:
        torch.multiprocessing.set_sharing_strategy("file_system")
        kept = list(tensors.items())
        for payload in (serialized(kept), serialized(dict(kept)), pickle.dumps(kept)):
            found = bucket_of(payload)
            assert {name: data for name, (_, _, data) in found.items()} == expected
            assert found["b"][:2] == ("BF16", (3, 2))
        torch.multiprocessing.set_sharing_strategy("file_descriptor")
        with pytest.raises(PickleRefused, match="set_sharing_strategy"):
            bucket_of(serialized(kept))
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.slow
def test_flattened_buckets_as_sglang_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the dataclasses of SGLang 0.5.23, under their module's name."""
    import types
    from dataclasses import make_dataclass

    import torch

    name = "sglang.srt.weight_sync.tensor_bucket"
    fields = ["name", "shape", "dtype", "start_idx", "end_idx", "numel"]
    metadata_class = make_dataclass("FlattenedTensorMetadata", fields)
    local_class = make_dataclass("LocalSerializedTensor", ["values"])
    module = types.ModuleType(name)
    for each in (metadata_class, local_class):
        each.__module__ = name
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, name, module)
    for package in ("sglang", "sglang.srt", "sglang.srt.weight_sync"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    tensors = {"a": torch.ones(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
    parts, metadata, at = [], [], 0
    for tensor_name, tensor in tensors.items():
        flat = tensor.flatten().view(torch.uint8)
        end = at + flat.numel()
        metadata.append(metadata_class(tensor_name, tensor.shape, tensor.dtype, at, end, flat.numel()))
        parts.append(flat)
        at = end
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        whole = {"flattened_tensor": torch.cat(parts), "metadata": metadata}
        found = bucket_of(serialized(whole), is_flattened=True)
        assert {key: value[:2] for key, value in found.items()} == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
        assert found["b"][2] == tensors["b"].view(torch.uint8).numpy().tobytes()
        local = [("a", local_class([serialized(tensors["a"]), serialized(tensors["a"])]))]
        assert bucket_of(serialized(local))["a"][:2] == ("F32", (2, 3))
        metadata[1].end_idx += 8
        with pytest.raises(PickleRefused, match="does not fit its shape"):
            bucket_of(serialized(whole), is_flattened=True)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def test_the_machine_leaves_what_is_behind_a_pickle() -> None:
    machine = Machine(memoryview(b"\x80\x04K\x07.rest"), TABLE)
    assert machine.load() == 7
    assert machine.position == 5
