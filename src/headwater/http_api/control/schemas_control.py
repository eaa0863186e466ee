"""Bodies of the routes for weights and memory: SGLang's names, `timeout` is ours."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from headwater.generation.native_schemas import Body
from headwater.generation.validation import Name, Text, within

MAX_WEIGHT_VALUES = 100_000
Seconds = Annotated[Any, Field(description="Seconds to wait, 0 to `--max-control-timeout`.")]  # checked later


class WeightsFromDisk(Body):
    """New weights from a folder or file that the server can read."""

    model_path: Text = Field(min_length=1, description="A safetensors folder (all tensors or some), or a .gguf file.")
    load_format: Text = Field(default="auto", description="auto, safetensors or gguf.")
    weight_version: Name | None = Field(default=None, description="New label; not given: it stays.")
    abort_all_requests: bool = Field(default=False, description="End running requests instead of carrying them over.")
    timeout: Seconds = None
    flush_cache: Any = Field(default=True, description="Ignored: no request ever matches KV of other weights.")
    keep_pause: Any = Field(default=False, description="Ignored: a pause always stays until /continue_generation.")
    is_async: Any = Field(default=False, description="Ignored: loading never stops the requests that run.")
    torch_empty_cache: Any = Field(default=False, description="Ignored.")
    recapture_cuda_graph: Any = Field(default=False, description="Ignored.")
    token_step: Any = Field(default=0, description="Ignored.")
    manifest: Any = Field(default=None, description="Ignored.")


class WeightVersion(Body):
    """A new label for the weights; no effect on the cache."""

    new_version: Name
    abort_all_requests: bool | None = Field(
        default=None,
        description="End running and waiting requests. Not given: yes, unless they wait by order "
        "(/pause_generation, /release_memory_occupation).",
    )


class WeightsByName(Body):
    """Which parameter, and how many of its values."""

    name: Text = Field(min_length=1, description="Its Hugging Face name, for example model.norm.weight.")
    truncate_size: Annotated[int, AfterValidator(within(1, MAX_WEIGHT_VALUES))] = Field(
        default=100, description="Values to return, row by row, from the first on."
    )


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class MemoryTags(Body):
    """Which memory: `kv_cache`, `weights`; none: all. `cuda_graph` is accepted, there is none to give back."""

    tags: Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)] = ()
    timeout: Seconds = None


class ResumeTags(MemoryTags):
    """Which memory to take again."""

    accept_changed_weights: bool = Field(
        default=False,
        description="Take weights whose files have changed since the release, with their own weights_id and an empty "
        "label. Otherwise the answer is 409, and nothing is resumed.",
    )
