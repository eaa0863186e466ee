"""Bodies of the routes for pauses, aborts, weights and memory: SGLang's names, `timeout` is ours."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from headwater.generation.body import Body
from headwater.generation.validation import Name, Text, within

MAX_WEIGHT_VALUES = 100_000
Seconds = Annotated[Any, Field(description="Seconds to wait, 0 to `--max-control-timeout`.")]  # checked later


class WeightsFromDisk(Body):
    """New weights from a folder or file that the server can read."""

    model_path: Text = Field(min_length=1, description="A safetensors folder (all tensors or some), or a .gguf file.")
    load_format: Text = Field(default="auto", description="auto, safetensors or gguf.")
    weight_version: Name | None = Field(default=None, description="New label; left out: the label stays.")
    abort_all_requests: bool = Field(default=False, description="Abort running requests; otherwise they continue.")
    timeout: Seconds = None
    flush_cache: Any = Field(default=True, description="Ignored: requests never match KV of other weights.")
    keep_pause: Any = Field(default=False, description="Ignored: a pause always stays until /continue_generation.")
    is_async: Any = Field(default=False, description="Ignored: loading never stops running requests.")
    torch_empty_cache: Any = Field(default=False, description="Ignored.")
    recapture_cuda_graph: Any = Field(default=False, description="Ignored.")
    token_step: Any = Field(default=0, description="Ignored.")
    manifest: Any = Field(default=None, description="Ignored.")


class LoadLora(Body):
    """A LoRA adapter to serve, and the name that requests use for it."""

    lora_name: Name = Field(min_length=1, description="Requests name it: `model` under /v1, `lora_path` of /generate.")
    lora_path: Text = Field(min_length=1, description="A folder that the server can read, in the layout of PEFT.")
    load_inplace: bool = Field(default=False, description="Replace the adapter of this name, if there is one.")
    timeout: Seconds = None
    pinned: Any = Field(default=False, description="Ignored: every loaded adapter stays in memory.")
    is_3d_lora_weight: Any = Field(default=False, description="Ignored.")
    added_tokens_config: Any = Field(default=None, description="Ignored.")


class LoraFromTensors(Body):
    """A LoRA adapter whose tensors a trainer sends: a file in shared memory, or SGLang's pickle."""

    lora_name: Name = Field(min_length=1, description="Requests name it: `model` under /v1, `lora_path` of /generate.")
    config_dict: dict[str, Any] | Text = Field(description="What adapter_config.json of PEFT holds, or its text.")
    load_inplace: bool = Field(default=False, description="Replace the adapter of this name, if there is one.")
    safetensors_path: Text | None = Field(
        default=None, description="A .safetensors file in /dev/shm. The server copies it before it answers."
    )
    serialized_tensors: Text | None = Field(
        default=None, description="SGLang's form: a base64 pickle. Needs --allow-pickled-tensors."
    )
    load_format: Literal["flattened_bucket"] | None = Field(
        default=None, description="Of the pickle: `flattened_bucket`, or left out."
    )
    timeout: Seconds = None
    pinned: Any = Field(default=False, description="Ignored: every loaded adapter stays in memory.")
    added_tokens_config: Any = Field(default=None, description="Ignored.")

    def config(self) -> bytes:
        """The text of adapter_config.json."""
        if isinstance(self.config_dict, str):
            return self.config_dict.encode()
        return json.dumps(self.config_dict).encode()


class UnloadLora(Body):
    """The adapter to stop serving."""

    lora_name: Name = Field(min_length=1, description="The name that it was loaded under.")
    lora_int_id: Any = Field(default=None, description="Ignored.")
    lora_id: Any = Field(default=None, description="Ignored.")


class WeightVersion(Body):
    """A new label for the weights; no effect on the cache."""

    new_version: Name = Field(description="The new label.")
    abort_all_requests: bool | None = Field(
        default=None,
        description="Abort running and waiting requests. Left out: yes, unless an operation holds them "
        "(/pause_generation, /release_memory_occupation).",
    )


class WeightsByName(Body):
    """The parameter to show, and the number of its values."""

    name: Text = Field(min_length=1, description="Hugging Face's name of the parameter, for example model.norm.weight.")
    truncate_size: Annotated[int, AfterValidator(within(1, MAX_WEIGHT_VALUES))] = Field(
        default=100, description="Number of values to return, row by row from the first."
    )


class CheckWeights(Body):
    """What to check."""

    action: Literal["checksum"] = Field(default="checksum", description="A hash of every tensor in place.")
    timeout: Seconds = None


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class MemoryTags(Body):
    """The memory to release: `kv_cache`, `weights`. `cuda_graph` is accepted and has no effect."""

    tags: Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="`kv_cache`, `weights`, or both; left out: both."
    )
    timeout: Seconds = None


class ResumeTags(MemoryTags):
    """The memory to allocate again."""

    accept_changed_weights: bool = Field(
        default=False,
        description="Take weights whose files have changed since the release, with their own weights_id and an empty "
        "label. Otherwise the answer is 409, and nothing is resumed.",
    )


class AbortRequest(Body):
    """Which running requests to end."""

    rid: Name = Field(default="", description="Abort every request whose rid begins with this text.")
    abort_all: bool = Field(default=False, description="Abort all requests.")
    abort_message: Name = Field(default="aborted by request", description="The reason that the aborted answers report.")


class PauseRequest(Body):
    """How to pause."""

    mode: Literal["abort", "retract", "in_place"] = Field(
        default="abort",
        description="`abort` ends running requests, `retract` queues them without KV, `in_place` freezes them.",
    )
