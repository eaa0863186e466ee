"""What speculation knows of one request."""

from dataclasses import dataclass, field
from enum import IntEnum

from headwater.cache.radix_tree import Node
from headwater.scheduling.speculation.acceptance import Acceptance
from headwater.scheduling.speculation.suffixes import TokenSuffixes


class Source(IntEnum):
    """Where a draft comes from. Each kind is right more or less often, so each has an estimate of its own."""

    NONE = 0
    SHORT_SUFFIX = 1  # a few tokens occurred before
    LONG_SUFFIX = 2
    TREE = 3  # the whole text is in the prefix tree, and goes on there


@dataclass(slots=True)
class Drafting:
    """A request whose tokens may be drafted. Written by `Speculation` and its drafter."""

    by_source: dict[Source, Acceptance] = field(default_factory=dict)
    suffixes: TokenSuffixes | None = None  # made with the first draft
    node: Node | None = None  # where its text is in the tree: it matches up to the end of this node
    num_in_node: int = 0  # tokens of the request up to that end
    is_on: bool = False  # whether a draft was found when one was last looked for
    source: Source = Source.NONE  # of the newest draft
    is_open: bool = False  # whether all tokens of the newest draft were right so far
    num_steps: int = 0  # with drafts
    num_drafted: int = 0
    num_accepted: int = 0
