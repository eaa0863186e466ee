"""What crosses the border between an API process and an engine process, as bytes.

The API process sends `ToEngine`, the engine sends `ToClient`; both are closed unions of tagged msgspec structs in
msgpack. Nothing here is pickled, nothing carries a tensor.
"""

import msgspec

from headwater.messages.cache import (
    AttachStorage,
    CacheTree,
    DetachStorage,
    GetCacheTree,
    GetPins,
    GetStorage,
    PinPrefix,
    Pins,
    StorageInfo,
    UnpinPrefix,
)
from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    Done,
    Failed,
    FlushCache,
    FlushResult,
    GetOperations,
    Operations,
    PauseGeneration,
    PauseResult,
)
from headwater.messages.generation import Abort, Generate, GenerateBatch, Outputs
from headwater.messages.state import EngineReady, EngineState, GetState, Hello, Ping, Shutdown
from headwater.messages.two_phase import Commit, InStep, Prepare, Prepared
from headwater.messages.weights import (
    GetWeights,
    MemoryResult,
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    UpdateWeights,
    Weights,
    WeightsUpdated,
    WeightVersionSet,
)

ToEngine = (
    Hello
    | Generate
    | GenerateBatch
    | Abort
    | FlushCache
    | PauseGeneration
    | ContinueGeneration
    | UpdateWeights
    | SetWeightVersion
    | GetWeights
    | ReleaseMemory
    | ResumeMemory
    | AttachStorage
    | DetachStorage
    | GetStorage
    | PinPrefix
    | UnpinPrefix
    | GetPins
    | GetCacheTree
    | Prepare
    | Commit
    | InStep
    | CancelOperation
    | GetOperations
    | GetState
    | Ping
    | Shutdown
)

ToClient = (
    Outputs
    | Done
    | Failed
    | Prepared
    | FlushResult
    | PauseResult
    | WeightsUpdated
    | WeightVersionSet
    | Weights
    | MemoryResult
    | StorageInfo
    | Pins
    | CacheTree
    | Operations
    | EngineState
    | EngineReady
)

encode = msgspec.msgpack.Encoder().encode

decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode

decode_to_client = msgspec.msgpack.Decoder(ToClient).decode
