"""Changes of several engines at once: prepared on all of them, then made by all or by none.

Both phases are answered under the `call_id` of the change itself: first with `Prepared` or `Failed`, then (after
`Commit`) with the answer of the change. `CancelOperation` gives a prepared change up.
"""

from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.messages.base import Answer, Call
from headwater.messages.cache import AttachStorage, DetachStorage, PinPrefix, UnpinPrefix
from headwater.messages.control import ContinueGeneration, PauseGeneration
from headwater.messages.weights import ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights

Change = (
    UpdateWeights
    | LoadAdapter
    | UnloadAdapter
    | SetWeightVersion
    | ReleaseMemory
    | ResumeMemory
    | PauseGeneration
    | ContinueGeneration
    | AttachStorage
    | DetachStorage
    | PinPrefix
    | UnpinPrefix
)


class Prepare(Call, tag="prepare"):
    """Do every part of `change` that can fail, without a visible effect. Answered by `Prepared`, or `Failed`.

    The prepared change waits for `Commit` until `change.expires_at_s`; then the engine undoes it by itself.
    """

    change: Change


class Prepared(Answer, tag="prepared"):
    """The change can no longer fail. Of a change of weights: their identity, and whether they replace all others.

    Of an adapter: its identity.
    """

    weights_id: str = ""
    is_whole: bool = True


class Commit(Call, tag="commit"):
    """Make the change with the call id `prepared`. Answered as the change is; `Failed` (410) if it was given up.

    In that case the engine knows that it is behind the others: it refuses requests (503) until `InStep`.
    """

    prepared: str


def answered_under(message: Call) -> str:
    """The call id of the answer to a message."""
    if isinstance(message, Prepare):
        return message.change.call_id
    return message.prepared if isinstance(message, Commit) else message.call_id


class InStep(Call, tag="in_step"):
    """The engine is in the desired state, and may take requests again. Answered by `Done`."""
