"""Weights and memory while the server runs: updates, versions, reading, release."""

from msgspec import field

from headwater.messages.base import Answer, Call, TimedCall
from headwater.messages.control import PagesAndBytes

MEMORY_TAGS = ("kv_cache", "weights")  # memory that can be released


class UpdateWeights(TimedCall, tag="update_weights", kw_only=True):
    """Load new weights from a folder or file and swap them in, all or nothing. Answered by `WeightsUpdated`.

    Running requests go on with the new weights unless `abort_all_requests`; their pages are not published.
    """

    path: str
    load_format: str = "auto"
    weight_version: str | None = None  # None: the label stays
    abort_all_requests: bool = False
    timeout_s: float = 600.0
    only_weights_id: str = ""  # refused (409) if the files hold other weights; empty: any
    weights_id: str = ""  # of tensors that a trainer sent, in a staging folder: their identity; empty: of the files
    names: tuple[str, ...] = ()  # of those tensors
    in_place: bool = False  # of those tensors: overwrite the weights layer by layer while nothing runs


class SetWeightVersion(Call, tag="set_weight_version"):
    """Change the client's label for the weights; the cache is not touched. Answered by `WeightVersionSet`.

    `abort_all_requests` None: end them unless they wait by order (a pause, released memory).
    """

    weight_version: str
    abort_all_requests: bool | None = False


class GetWeights(Call, tag="get_weights"):
    """The first values of a parameter, by its Hugging Face name. Answered by `Weights` or `Failed` (404)."""

    name: str
    num_values: int = 100


class GetParameters(Call, tag="get_parameters"):
    """The tensors of the model. Answered by `Parameters`."""


class Parameters(Answer, tag="parameters"):
    """Every tensor of the whole model under its Hugging Face name. Others may come with them and are ignored."""

    shapes: dict[str, tuple[int, ...]]
    ignored_suffixes: tuple[str, ...] = ()


class GetChecksums(TimedCall, tag="get_checksums"):
    """A hash of every tensor in place. Answered by `Checksums` or `Failed`."""

    timeout_s: float = 600.0


class Checksums(Answer, tag="checksums"):
    weights_id: str
    checksums: dict[str, str]  # 16 hex digits by name of the tensor


class ReleaseMemory(TimedCall, tag="release_memory"):
    """Give memory back: any of `kv_cache`, `weights`. Waits up to `timeout_s` until nothing runs.

    New requests are queued meanwhile and until `ResumeMemory`. Answered by `MemoryResult`, or `Failed` with
    the blockers. Releasing released memory is harmless.
    """

    tags: tuple[str, ...] = ()  # empty: all


class ResumeMemory(TimedCall, tag="resume_memory"):
    """Take released memory again; weights are read from their files. Answered by `MemoryResult`.

    Files that hold other weights by now are refused (409) and nothing is done. With `accept_changed_weights` they are
    loaded under their own `weights_id`, and the label becomes empty.
    """

    tags: tuple[str, ...] = ()  # empty: all that is released
    timeout_s: float = 600.0
    accept_changed_weights: bool = False


class WeightsUpdated(Answer, tag="weights_updated"):
    """New weights are in place; no request can match KV of the old ones any more."""

    message: str
    weights_id: str
    weight_version: str
    generation: int
    num_tensors: int
    num_kept: int  # requests that ran on across the update
    num_aborted: int
    waited_s: float
    freed: dict[str, PagesAndBytes] = field(default_factory=dict)
    retired: dict[str, PagesAndBytes] = field(default_factory=dict)
    is_whole: bool = True  # every earlier weight is replaced
    paused_s: float = 0.0  # in which nothing was generated


class WeightVersionSet(Answer, tag="weight_version_set"):
    weight_version: str
    num_aborted: int


class Weights(Answer, tag="weights"):
    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[float, ...]  # the first ones, row by row


class MemoryResult(Answer, tag="memory_result"):
    released: tuple[str, ...]  # what is released now
    num_bytes: int  # released or taken again by this call
    waited_s: float
    weights_id: str = ""  # of the weights in place after a resume
    weight_version: str = ""
    has_changed_weights: bool = False  # other weights than were released
