"""Changes of several engines at once: prepared on all of them, then carried out on all, or on none.

The answers to both phases go under the `call_id` of the change itself: first `Prepared` or `Failed`, then (after
`Commit`) what the change is answered with anyway. `CancelOperation` gives a prepared change up.
"""

from headwater.messages.base import Answer, Call
from headwater.messages.cache import AttachStorage, DetachStorage, PinPrefix, UnpinPrefix
from headwater.messages.control import ContinueGeneration, PauseGeneration
from headwater.messages.weights import ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights

Change = (
    UpdateWeights
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
    """Do all of `change` that can fail, and nothing that shows. Answered by `Prepared`, or `Failed`.

    What is prepared waits for `Commit` until `change.expires_at_s`; then the engine undoes it by itself.
    """

    change: Change


class Prepared(Answer, tag="prepared"):
    """The change cannot fail any more. For one that puts weights in place: their identity, and whether nothing is left
    of those before."""

    weights_id: str = ""
    is_whole: bool = True


class Commit(Call, tag="commit"):
    """Carry out what was prepared under `prepared`. Answered as the change is; `Failed` (410) if it was given up.

    Then the engine is behind the others, and knows it: it refuses requests (503) until `InStep`.
    """

    prepared: str


class InStep(Call, tag="in_step"):
    """The engine is found to be as the server was told, and may take requests again. Answered by `Done`."""
