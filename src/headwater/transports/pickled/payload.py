"""The table of names of a trainer's payload, and the tensors that they build: descriptions, no torch."""

import math
from dataclasses import dataclass
from typing import Any

from headwater.devices.safetensors_header import ITEM_BYTES
from headwater.transports.pickled.machine import Builder, Instance, Machine, PickleRefused, Table

MAX_DIMENSIONS = 8
_REDUCTIONS = "torch.multiprocessing.reductions"
_FLATTENED, _LOCAL, _BUCKET = "FlattenedTensorMetadata", "LocalSerializedTensor", "FlattenedTensorBucket"
# where versions of SGLang and trainers have these classes
_SGLANG_MODULES = (
    "sglang.srt.weight_sync.tensor_bucket",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.model_executor.model_runner_components.weight_updater",
)
_DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "long": "I64", "int32": "I32", "int": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the files of torch.save before its zip files


@dataclass(frozen=True, slots=True)
class InlineStorage:
    """Numbers that lie in the payload."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class SharedStorage:
    """Numbers in a POSIX shared memory of the sender."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TypedStorage:
    """A storage and the type of its numbers."""

    storage: InlineStorage | SharedStorage
    dtype: str


@dataclass(frozen=True, slots=True)
class HostTensorView:
    """A tensor in host memory: `offset` and `strides` count numbers."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: InlineStorage | SharedStorage


@dataclass(frozen=True, slots=True)
class CudaTensorHandle:
    """A tensor on a GPU of this host, by the arguments that PyTorch's `rebuild_cuda_tensor` takes."""

    dtype: str
    shape: tuple[int, ...]
    arguments: tuple[Any, ...]
    first_byte: int | None = None  # of a part of a flattened bucket: it begins there in the tensor of the handle


PayloadTensor = HostTensorView | CudaTensorHandle


def load_payload(data: bytes | memoryview) -> Any:
    """The value of a payload: lists, dicts, texts and numbers, tensors as above. PickleRefused for all else."""
    return Machine(memoryview(data), TABLE).load()


def _dtype(value: Any) -> str:
    if not isinstance(value, Builder) or value.name not in _DTYPES:
        raise PickleRefused("a dtype is expected")
    return _DTYPES[value.name]


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMENSIONS:
        raise PickleRefused(f"a shape of at most {MAX_DIMENSIONS} dimensions is expected")
    return tuple(_count(size) for size in value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise PickleRefused("a size or place is no plain number")
    return value


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> HostTensorView:
    if not isinstance(storage, TypedStorage):
        raise PickleRefused("a tensor has no storage")
    shape, strides, first = _sizes(size), _sizes(stride), _count(offset)
    if len(shape) != len(strides):
        raise PickleRefused("a tensor has other strides than dimensions")
    last = first + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    if math.prod(shape) and (last + 1) * ITEM_BYTES[storage.dtype] > _num_bytes(storage.storage):
        raise PickleRefused("a tensor is larger than its storage")
    return HostTensorView(storage.dtype, shape, strides, first, storage.storage)


def _num_bytes(storage: InlineStorage | SharedStorage) -> int:
    return storage.num_bytes if isinstance(storage, SharedStorage) else len(storage.data)


def _rebuild_tensor(_: Any, storage: Any, metadata: Any) -> HostTensorView:
    return _view(storage, *metadata[:3])


def _rebuild_parameter(tensor: Any, *_: Any) -> PayloadTensor:
    if not isinstance(tensor, PayloadTensor):
        raise PickleRefused("a parameter has no tensor")
    return tensor


def _typed_storage(storage: Any, dtype: Any) -> TypedStorage:
    if not isinstance(storage, InlineStorage | SharedStorage):
        raise PickleRefused("a typed storage has no storage")
    return TypedStorage(storage, _dtype(dtype))


def _shared_storage(_: Any, manager: Any, handle: Any, size: Any, dtype: Any = None) -> SharedStorage:
    """`rebuild_storage_filename`. The sender keeps the memory until the call is answered."""
    if not isinstance(handle, memoryview) or len(handle) > 255:
        raise PickleRefused("a shared memory has no name")
    if dtype is not None:
        raise PickleRefused("a shared memory of a typed storage is not read")
    return SharedStorage(bytes(handle).decode("ascii"), _count(size))


def _refuse_descriptor(*_: Any) -> None:
    raise PickleRefused(
        "tensors of PyTorch's sharing strategy file_descriptor can be read by child processes of the sender only: "
        'call torch.multiprocessing.set_sharing_strategy("file_system"), or send a safetensors body'
    )


def _cuda_tensor(_: Any, size: Any, stride: Any, offset: Any, storage: Any, dtype: Any, *more: Any) -> CudaTensorHandle:
    """`rebuild_cuda_tensor`: device, handle, bytes, offset, requires_grad, counter, its offset, event, sync."""
    if len(more) != 9:
        raise PickleRefused(f"a handle of CUDA has {len(more)} facts, 9 are expected")
    shape, strides = _sizes(size), _sizes(stride)
    plain = [bytes(fact) if isinstance(fact, memoryview) else fact for fact in more]
    if not all(isinstance(fact, bytes | int | str | None) for fact in plain):
        raise PickleRefused("a handle of CUDA holds something else than numbers and bytes")
    name = _DTYPES[_named(dtype)]
    return CudaTensorHandle(name, shape, (shape, strides, _count(offset), _named(dtype), *plain))


def _named(dtype: Any) -> str:
    _dtype(dtype)
    return dtype.name


def _size(sizes: Any = ()) -> tuple[int, ...]:
    return _sizes(sizes)


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if items not in ((), []):
        raise PickleRefused("an OrderedDict is filled by its items only")
    return {}


def _load_from_bytes(data: Any) -> TypedStorage:
    """A storage as `torch.save` wrote it before its zip files: five pickles, then the numbers."""
    if not isinstance(data, memoryview):
        raise PickleRefused("a saved storage is no bytes")
    at, values, found = 0, [], {}

    def find_storage(key: Any) -> TypedStorage:
        kind, storage_type, _, location, count, view = key
        if kind != "storage" or location != "cpu" or view is not None or found or not isinstance(storage_type, Builder):
            raise PickleRefused("a saved storage is of an unknown kind")
        dtype = _STORAGES.get(storage_type.name)
        if dtype is None:
            raise PickleRefused("a saved storage has no dtype")
        found["numbers"] = (dtype, _count(count) * ITEM_BYTES[dtype])
        return found  # type: ignore[return-value]  # compared below: the numbers come behind it

    for _ in range(5):
        machine = Machine(data[at:], TABLE, find_storage=find_storage)
        values.append(machine.load())
        at += machine.position
    magic, protocol, _, storage, keys = values
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or storage is not found or len(keys) != 1:
        raise PickleRefused("a saved storage is not in the form of torch.save")
    dtype, num_bytes = found["numbers"]
    numbers = data[at + 8 :]
    if len(numbers) != num_bytes:
        raise PickleRefused(f"a saved storage has {len(numbers)} bytes, {num_bytes} are expected")
    return TypedStorage(InlineStorage(numbers), dtype)


def _entries() -> dict[str, Builder]:
    calls = {
        "torch._utils._rebuild_tensor_v2": _view,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        f"{_REDUCTIONS}.rebuild_tensor": _rebuild_tensor,
        f"{_REDUCTIONS}.rebuild_typed_storage": _typed_storage,
        f"{_REDUCTIONS}.rebuild_storage_filename": _shared_storage,
        f"{_REDUCTIONS}.rebuild_storage_fd": _refuse_descriptor,
        f"{_REDUCTIONS}.rebuild_cuda_tensor": _cuda_tensor,
        "sglang.srt.utils.patch_torch._rebuild_cuda_tensor_modified": _cuda_tensor,
        "torch.storage._load_from_bytes": _load_from_bytes,
        "torch.Size": _size,
        "collections.OrderedDict": _ordered_dict,
    }
    table = {name: Builder(name, call) for name, call in calls.items()}
    for name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.storage.TypedStorage"):
        table[name] = Builder(name)
    for name in _STORAGES:
        table[f"torch.{name}"] = table[f"torch.storage.{name}"] = Builder(name)
    for name in _DTYPES:
        table[f"torch.{name}"] = Builder(name)
    table["multiprocessing.resource_sharer.DupFd"] = Builder("DupFd", has_state=True)
    for module in _SGLANG_MODULES:
        for name in (_FLATTENED, _LOCAL, _BUCKET):
            table[f"{module}.{name}"] = Builder(name, has_state=True)
    return table


TABLE: Table = _entries()


def named_tensors(data: bytes | memoryview, *, is_flattened: bool) -> list[tuple[str, PayloadTensor]]:
    """The tensors of one payload under their names. `is_flattened`: it is a bucket of load_format flattened_bucket."""
    value = load_payload(data)
    if isinstance(value, Instance) and value.name == _BUCKET:
        value, is_flattened = value.state, True
    found = _split(value) if is_flattened else _listed(value)
    names = [name for name, _ in found]
    if not names or len(set(names)) != len(names):
        raise PickleRefused("the payload holds no tensors, or a name twice")
    return found


def _listed(value: Any) -> list[tuple[str, PayloadTensor]]:
    if isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, list | tuple):
        raise PickleRefused("a list of (name, tensor) is expected")
    return [_pair(item) for item in value]


def _pair(item: Any) -> tuple[str, PayloadTensor]:
    if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], str):
        raise PickleRefused("a list of (name, tensor) is expected")
    name, tensor = item
    if isinstance(tensor, Instance) and tensor.name == _LOCAL:  # one payload for each rank, of whole tensors
        values = tensor.state.get("values")
        if not isinstance(values, list) or not values or not isinstance(values[0], memoryview):
            raise PickleRefused(f"tensor {name!r} has no payload")
        tensor = load_payload(values[0])
    if not isinstance(tensor, PayloadTensor):
        raise PickleRefused(f"{name!r} is no tensor")
    return name, tensor


def _split(value: Any) -> list[tuple[str, PayloadTensor]]:
    """A flattened bucket: bytes of many tensors in one, and where each of them lies."""
    if not isinstance(value, dict):
        raise PickleRefused("a flattened bucket is a dict")
    flat, metadata = value.get("flattened_tensor"), value.get("metadata")
    if not isinstance(flat, PayloadTensor) or not isinstance(metadata, list):
        raise PickleRefused("a flattened bucket has flattened_tensor and metadata")
    item_bytes = ITEM_BYTES[flat.dtype]  # older trainers flatten numbers of one dtype, newer ones bytes
    if len(flat.shape) != 1:
        raise PickleRefused("flattened_tensor must have one dimension")
    return [_part(flat, meta, item_bytes=item_bytes) for meta in metadata]


def _part(flat: PayloadTensor, meta: Any, *, item_bytes: int) -> tuple[str, PayloadTensor]:
    if not isinstance(meta, Instance) or meta.name != _FLATTENED:
        raise PickleRefused("metadata is a list of FlattenedTensorMetadata")
    name, dtype = meta.state.get("name"), _dtype(meta.state.get("dtype"))
    shape, start = _sizes(meta.state.get("shape")), _count(meta.state.get("start_idx"))
    end = _count(meta.state.get("end_idx"))
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if not isinstance(name, str) or (end - start) * item_bytes != num_bytes or end > flat.shape[0]:
        raise PickleRefused(f"the part {name!r} of a flattened bucket does not fit its shape")
    if isinstance(flat, CudaTensorHandle):
        return name, CudaTensorHandle(dtype, shape, flat.arguments, first_byte=start * item_bytes)
    if flat.strides != (1,) and num_bytes:
        raise PickleRefused("flattened_tensor must be contiguous")
    first = (flat.offset + start) * item_bytes
    if first % ITEM_BYTES[dtype]:
        raise PickleRefused(f"the part {name!r} of a flattened bucket is not aligned")
    return name, HostTensorView(dtype, shape, _row_major(shape), first // ITEM_BYTES[dtype], flat.storage)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))
