"""Which operation each control message starts: a new one needs its struct, its operation, and a line here."""

from collections.abc import Callable
from typing import Any

from headwater.control import at_once
from headwater.control.adapters import AdapterLoad, unload_adapter
from headwater.control.at_once import PinChange
from headwater.control.checksums import ChecksumRun
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.flush import Flush
from headwater.control.memory import MemoryRelease, MemoryResume
from headwater.control.operation import Operation, Permit
from headwater.control.pause import Pause
from headwater.control.storage_attach import StorageAttach
from headwater.control.storage_push import StoragePush
from headwater.control.weights import WeightUpdate
from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.messages.base import Call
from headwater.messages.cache import (
    AttachStorage,
    DetachStorage,
    GetPins,
    GetStorage,
    PersistCache,
    PinPrefix,
    UnpinPrefix,
)
from headwater.messages.control import ContinueGeneration, FlushCache, PauseGeneration
from headwater.messages.weights import (
    GetChecksums,
    GetParameters,
    GetWeights,
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    UpdateWeights,
)

OPERATIONS: dict[type[Call], Callable[[Any, ControlledEngine, Permit], Operation]] = {
    FlushCache: Flush,
    PauseGeneration: Pause,
    ContinueGeneration: at_once.at_once(at_once.continue_generation, ends=Pause.kind),
    UpdateWeights: WeightUpdate,
    LoadAdapter: AdapterLoad,
    UnloadAdapter: at_once.at_once(unload_adapter),
    SetWeightVersion: at_once.at_once(at_once.set_weight_version),
    GetWeights: at_once.at_once(at_once.get_weights),
    GetParameters: at_once.at_once(at_once.get_parameters),
    GetChecksums: ChecksumRun,
    ReleaseMemory: MemoryRelease,
    ResumeMemory: MemoryResume,
    AttachStorage: StorageAttach,
    PersistCache: StoragePush,
    DetachStorage: at_once.at_once(at_once.detach_storage),
    GetStorage: at_once.at_once(at_once.get_storage),
    PinPrefix: PinChange,
    UnpinPrefix: PinChange,
    GetPins: at_once.at_once(at_once.get_pins),
}
